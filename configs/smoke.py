"""Whether training runs at all: an untrained toy on the README, in seconds. Nothing is learnt.

python -m train.finetune configs/smoke.py
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model="tiny",
    texts=("README.md",),
    out="out/smoke",
    steps=6,
    batch=4,
    seq_length=128,
    window=(16, 32),
    sinks=(0, 4),
    chunk=(8, 16),
    d_mem=8,
    warmup=2,
    checkpoint_every=3,
    log_every=1,
)
