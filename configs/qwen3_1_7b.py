"""Qwen3-1.7B with the paper's settings: 5 million tokens, window, sinks and chunk drawn each step (arXiv 2602.13680).

    python -m train.finetune configs/qwen3_1_7b.py --model MODELS/Qwen3-1.7B                    # one H100
    python -m train.finetune configs/qwen3_1_7b.py --model MODELS/Qwen3-1.7B --mesh 1 1 1 8     # v5e-8, 2x4
    python -m train.finetune configs/qwen3_1_7b.py --model MODELS/Qwen3-1.7B --mesh 1 8 1 8 --batch 8 --steps 26 \
        --warmup 2 --checkpoint_every 4                                                         # v5p, 4x4x4

The data, and all but the steps, are as in `qwen3_0_6b.py`; read there what has been seen to remember.

Not run yet. By the formulas of train/loop/flops.py at 40 % of the peak: 3.7 minutes on one H100, 2.3 minutes on v5e-8
and 8 seconds on 64 chips of v5p, to which compiling four chunk sizes adds minutes. On v5e-8 a device needs 7.1 of 15.7
GiB by the plan (--compile_only v5e:2x4). Sixty-four chips want 8 rows a step, which leaves 26 updates: they are for
longer runs.
"""

import dataclasses
import pathlib

from train.recipe import read_recipe

smaller = read_recipe(str(pathlib.Path(__file__).with_name("qwen3_0_6b.py")))
config = dataclasses.replace(smaller, out="out/qwen3-1.7b", steps=204)
