"""Qwen3-0.6B with the paper's settings: 3 million tokens, window, sinks and chunk drawn each step (arXiv 2602.13680).

    python -m train.finetune configs/qwen3_0_6b.py --model MODELS/Qwen3-0.6B                    # one H100
    python -m train.finetune configs/qwen3_0_6b.py --model MODELS/Qwen3-0.6B --mesh 1 1 1 8     # v5e-8, 2x4
    python -m train.finetune configs/qwen3_0_6b.py --model MODELS/Qwen3-0.6B --mesh 1 8 1 8 --batch 8 --steps 16 \
        --warmup 2 --checkpoint_every 4                                                         # v5p, 4x4x4

Rows are 24,576 tokens: whole long chats with the loss on the assistant's turns, and as often short chats, packed in
pieces of 4,096 tokens, with the loss on everything. Put both in data/long_chats and data/short_chats (files of
{"messages": [...]}), or name others: --mixture.0.texts FOLDER --mixture.1.texts FOLDER. The shares are ours, not the
paper's. Windows may be shorter than chunks, as in the paper; the run warns of it.

The paper's memory starts at random and reads f(W, q). `qwen3_0_6b_memory.py` makes the one that has been seen to
remember, in SmolLM2 (docs/results.md).

Not run yet. By the formulas of train/loop/flops.py at 40 % of the peak: 1.5 minutes on one H100, 1 minute on v5e-8 and
3 seconds on 64 chips of v5p, to which compiling four chunk sizes adds minutes. On v5e-8 a device needs 4.4 of 15.7 GiB
by the plan (--compile_only v5e:2x4). Sixty-four chips want 8 rows a step, which leaves 16 updates: they are for longer
runs.
"""

from train.data import stream
from train.recipe import FinetuneConfig

config = FinetuneConfig(
    mixture=(
        stream.Part(texts=("data/long_chats",), response_only=True),
        stream.Part(texts=("data/short_chats",), piece=4096),
    ),
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
    remat="attention",
    checkpoint_every=16,
    log_every=1,
)
