"""What a training run is made of.

models        the model that it starts from, and the files that it leaves
batches       rows of texts, on their way to the devices
steps         one step as pure functions
gauges        what the memory tells of itself
optimizer     AdamW and its schedule
compiled      a recipe's jitted functions
teacher       what the original gives, kept on disk
evaluation    held-out texts
checkpoint    what is trained, saved and found again
metrics       what a run says
distributed   joining the processes of a run
flops, plan, estimate   what a step costs, whether it fits, and which part of it is long
tiny          a toy model that needs no files
"""

__all__ = [
    "batches",
    "checkpoint",
    "compiled",
    "distributed",
    "estimate",
    "evaluation",
    "flops",
    "gauges",
    "metrics",
    "models",
    "optimizer",
    "plan",
    "steps",
    "teacher",
    "tiny",
]
