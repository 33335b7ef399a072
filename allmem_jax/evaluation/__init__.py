"""What a converted model can do, what it loses, and what it costs.

divergence          KL and cross-entropy by position, against the original; `divergence_report` shows it
recall              generated answers to what was said beyond the window; `questions` hides and asks
longbench           LongBench, InfiniteBench and LV-Eval; `longbench_data` and `longbench_metrics` are theirs
harness             the model in lm-evaluation-harness
cost                parameters, bytes of state and operations, by formula
latency             time a token, measured
full_report         all of these on one page
"""

__all__ = [
    "cost",
    "divergence",
    "divergence_report",
    "full_report",
    "harness",
    "latency",
    "longbench",
    "longbench_data",
    "questions",
    "recall",
]
