"""What a training run is made of.

steps         one step as pure functions
compiled      a recipe's jitted functions
checkpoint    what is trained, saved and found again
metrics       what a run says
distributed   joining the processes of a run
flops, plan   what a step costs, and whether it fits
tiny          a toy model that needs no files
"""

__all__ = ["checkpoint", "compiled", "distributed", "flops", "metrics", "plan", "steps", "tiny"]
