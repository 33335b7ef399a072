"""SmolLM2-135M on 8,192 tokens of books, for every mixer, seed and control: `python -m train.experiments.evidence`.

Half the window and half the tokens of the demo, so that a 2-core CPU can do its 18 runs; `smollm2_3m.py` is the same
question put with 3 million tokens.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    start="attention",
    read_out="difference",
    delay=True,
    alpha_init=0.05,
    steps=16,
    batch=1,
    seq_length=512,
    window=(64, 64),
    sinks=(4, 4),
    chunk=(32,),
    positions=0.5,
    warmup=2,
    decay=0.5,
    inside_weight=4.0,
    remat="none",
    checkpoint_every=16,
    log_every=8,
    teacher_cache=1.0,
)
