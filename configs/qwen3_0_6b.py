"""Qwen3-0.6B with the paper's settings: 3 million tokens, everything drawn anew each step (arXiv 2602.13680).

    python -m train.finetune configs/qwen3_0_6b.py --model PATH/Qwen3-0.6B --texts PATH/TO/TEXTS

For an accelerator: 128 steps of one row of 24,576 tokens are 3.1 million. Windows may be shorter than chunks, as in the
paper; the run warns of it. On several devices give --mesh (data, fsdp, tensor, context) and a batch that divides.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    out="out/qwen3-0.6b",
    steps=128,
    batch=1,
    seq_length=24576,
    window=(512, 8192),
    sinks=(0, 256),
    chunk=(512, 1024, 2048, 4096),
    positions=0.25,
    learning_rate=1e-4,
    warmup=10,
    decay=0.2,
    lr_init=0.001,
    dtype="bfloat16",
    backbone_dtype="bfloat16",
    checkpoint_every=16,
    log_every=1,
)
