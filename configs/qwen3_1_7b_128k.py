"""Qwen3-1.7B on rows of 131,072 tokens, 100 million in all, for 64 chips of v5p (topology 4x4x4, "v5p-128" at Google).

    python -m train.finetune configs/qwen3_1_7b_128k.py --model MODELS/Qwen3-1.7B

A row is spread over 8 devices, as many as the model has key heads (tensor x context must divide them), and 8 rows make
a step. Put books, code or long chats in data/long_texts (--texts FOLDER ...); a row that no document fills is packed.
The original is the teacher at this length, and Qwen3 was pretrained on 32,768 tokens: give it YaRN first, as its
authors say, with "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} in
the folder's config.json.

Not run yet. By the formulas of train/loop/flops.py at 40 % of the peak: 2.7 s a step, 4.5 minutes in all, 4.6 device
hours, 59 % of it the teacher's full attention; compiling four chunk sizes comes to that.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    texts=("data/long_texts",),
    out="out/qwen3-1.7b-128k",
    steps=96,
    batch=8,
    seq_length=131072,
    pack=True,
    window=(512, 8192),
    sinks=(0, 256),
    chunk=(512, 1024, 2048, 4096),
    positions=0.25,
    learning_rate=1e-4,
    warmup=8,
    decay=0.2,
    lr_init=0.001,
    dtype="bfloat16",
    backbone_dtype="bfloat16",
    mesh=(1, -1, 1, 8),
    checkpoint_every=16,
    log_every=1,
)
