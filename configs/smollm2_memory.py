"""The memory of SmolLM2-135M-Instruct that comes with this package: four minutes on one H200, then 90 on a CPU.

    python -m train.data.books out/texts
    python -c "from pydoc_data.topics import topics as t; print(*map(t.get, sorted(t)), sep=2 * chr(10))" \
        > out/texts/python.txt
    python -m train.curriculum configs/smollm2_memory.py --texts out/texts --out out/smollm2 \
        --card configs/smollm2_memory.md

11.8 million tokens of 72 plays and poems, most rows of which are lessons (`train/data/lessons.py`): first short rows
full of facts at the smallest window, then longer ones with lists, variables, quotations and prose, at windows drawn
anew each step. Cross-entropy on the answers, in nats, at the first and the last tenth of each stage, the original's
beside it, and tokens per second:

    stage                        first   last   original   tokens/s
    1    250 x 32 x   320         3.99   0.04       0.75     89,000
    2    250 x 24 x 1,024         2.72   0.73       0.98     93,000
    3     80 x  8 x 4,096         2.90   1.55       1.94     62,000
    4     90 x  2 x 1,024         1.55   0.84       1.16         69  (2 cores, float32)
    5    150 x  1 x 2,048         1.67   2.28       1.40        120  (2 cores, bfloat16; means over 9 or 10 lessons)

Every stage starts from the memory before it with a new optimiser. The first three took 216 seconds, of which 135 were
steps (the first of each stage, which compiles, not counted); they were run before reads had a floor, with tokens
written as they come. Before the fourth, which writes them as they leave the window, each floor was set by hand to three
times the median of what its head finds in six of the training texts; run from here, the start sets it. The fifth is
mostly prose, with a loss where a key has left the window and Python's documentation among the texts (the four before it
had none): it brings the model nearer to the original than its window alone does. After it the kernel of the values'
convolution was halved by hand, and with it all that is written: long prompts no longer fill the memory (docs/results.md
has the measurements). What the whole gives in one go has not been measured. configs/smollm2_memory.md is the model
card: what the memory does, and what it costs.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    start="attention",
    read_out="difference",
    alpha_init=0.1,
    sinks=(4, 4),
    chunk=(64,),
    positions=0.25,
    inside_weight=4.0,
    dtype="bfloat16",
    backbone_dtype="bfloat16",
    remat="none",
    checkpoint_every=1000,
    log_every=10,
)

stages = (
    dict(steps=250, batch=32, seq_length=320, window=(64, 64), lessons=0.9, kinds=("facts",), answer_weight=2.0,
         learning_rate=2e-3, warmup=10, decay=0.2),
    dict(steps=250, batch=24, seq_length=1024, window=(64, 256), lessons=0.6, answer_weight=1.0,
         learning_rate=1e-3, warmup=10, decay=0.2),
    dict(steps=80, batch=8, seq_length=4096, window=(128, 512), lessons=0.5, answer_weight=0.5,
         learning_rate=1e-3, warmup=10, decay=0.5),
    dict(steps=90, batch=2, seq_length=1024, window=(128, 512), lessons=0.5, answer_weight=0.5, delay=True,
         learning_rate=5e-4, warmup=2, decay=0.7, seed=3),
    dict(steps=150, batch=1, seq_length=2048, window=(128, 512), lessons=0.3, answer_weight=0.5, delay=True,
         positions=0.5, beyond_window=True, inside_weight=1.0, learning_rate=1e-3, warmup=5, decay=0.6, seed=5),
)  # fmt: skip
