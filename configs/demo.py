"""SmolLM2-135M on a few books, in minutes on a 2-core CPU: what `make demo` trains.

    python -m train.fetch
    python -m train.finetune configs/demo.py --texts .cache/text/shakespeare --out out/smollm2

The window, sinks and chunk are fixed: at 30,000 tokens there is nothing to spread over a range, and one chunk is one
compilation. The memory starts from the attention, reads the difference to its initial weights, so that with writing off
it is windowed attention itself, and takes a token when it leaves the window, so that within it nothing is disturbed and
no loss needs to be taken there.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    start="attention",
    read_out="difference",
    delay=True,
    alpha_init=0.05,
    steps=30,
    batch=1,
    seq_length=1024,
    window=(128, 128),
    sinks=(4, 4),
    chunk=(64,),
    positions=0.5,
    beyond_window=True,
    learning_rate=1e-3,
    warmup=2,
    decay=0.5,
    remat="none",
    checkpoint_every=4,
    log_every=1,
)
