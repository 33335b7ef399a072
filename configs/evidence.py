"""SmolLM2-135M on 4,096 tokens of books, for every mixer, seed and control: `python -m train.experiments.evidence`.

Half the window and a quarter of the tokens of the demo, so that a 2-core CPU can do its 18 runs. What is trained
on so little adapts and no more is expected of it; `smollm2_3m.py` is the same question put with 3 million.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    steps=8,
    batch=1,
    seq_length=512,
    window=(64, 64),
    sinks=(4, 4),
    chunk=(32,),
    positions=0.25,
    learning_rate=8e-4,
    warmup=2,
    decay=0.5,
    inside_weight=4.0,
    checkpoint_every=8,
    log_every=4,
)
