"""SmolLM2-135M on 3 million tokens of books, the size of run that the paper reports for its smallest model; one H100.

    python -m train.experiments.evidence configs/smollm2_3m.py --length 4096     # all mixers, seeds, controls
    python -m train.finetune configs/smollm2_3m.py --model MODEL.gguf --texts BOOKS --out out/smollm2     # one run

Windows and sinks are drawn anew each step, as in the paper, between a short and a long one, and so is the chunk. Not
run to the end yet: no figure in this project comes from it. By the formulas of train/loop/flops.py at 40 % of the peak
one run takes 8 seconds of steps, so compiling two chunk sizes and reading the model are most of it.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    start="attention",
    read_out="difference",
    delay=True,
    alpha_init=0.1,
    lessons=0.5,
    steps=92,
    batch=8,
    seq_length=4096,
    window=(128, 512),
    sinks=(4, 128),
    chunk=(64, 128),
    positions=0.25,
    learning_rate=1e-3,
    warmup=8,
    decay=0.3,
    inside_weight=4.0,
    dtype="bfloat16",
    checkpoint_every=23,
    log_every=5,
)
