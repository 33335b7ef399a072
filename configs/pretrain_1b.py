"""A 1B model with windows and memory from random weights: Llama-3.2-1B's sizes, 20 billion tokens, 64 chips of v5p.

    python -m train.prepare configs/pretrain_1b.py --tokenizer MODELS/Llama-3.2-1B     # tokens, once
    python -m train.finetune configs/pretrain_1b.py --tokenizer MODELS/Llama-3.2-1B    # v5p, 4x4x4

Put the corpus in data/web (--texts FOLDER ...) as .parquet, .arrayrecord or .jsonl files of {"text": ...}; its tokens
take 4 bytes each in `cache`, which every host must see. Only the tokenizer is taken from the folder. A step is 256 rows
of 8,192 tokens, 2.1 million in all, 4 rows a chip; every document starts on the grid of chunks.

Not run yet: the learning rate and the memory's start are guesses, not results. By the formulas of train/loop/flops.py
at 40 % of the peak: 1.5 s a step, 3.9 hours for 9,536 steps, 250 device hours. A device needs 9.4 of 95 GiB by the plan
(--compile_only v5p:4x4x4), so --remat dots, which computes less twice, may fit as well.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    objective="pretrain",
    model="llama-3.2-1b",
    texts=("data/web",),
    out="out/pretrain-1b",
    steps=9536,
    batch=256,
    seq_length=8192,
    pack=True,
    window=(1024, 1024),
    sinks=(4, 4),
    chunk=(512,),
    learning_rate=4e-4,
    warmup=500,
    decay=0.2,
    weight_decay=0.1,
    lr_init=0.001,
    dtype="bfloat16",
    mesh=(1, -1, 1, 1),
    checkpoint_every=500,
    keep=3,
)
