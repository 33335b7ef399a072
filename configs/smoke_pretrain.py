"""Whether pretraining runs at all: a toy on the README, in half a minute, most of it compiling. Little is learnt.

python -m train.finetune configs/smoke_pretrain.py
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    objective="pretrain",
    model="tiny",
    texts=("README.md",),
    out="out/smoke-pretrain",
    steps=6,
    batch=2,
    seq_length=64,
    pack=True,
    window=(16, 16),
    sinks=(2, 2),
    chunk=(8,),
    d_mem=8,
    warmup=2,
    checkpoint_every=3,
    log_every=1,
)
