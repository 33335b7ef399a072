"""What a converted model can do, what it loses, and what it costs.

divergence          KL and cross-entropy by position, against the original; `divergence_report` shows it
recall              generated answers to what was said beyond the window; `recall_report` sums them up
questions           what is asked; `haystacks` hides it in real texts
longbench           LongBench, InfiniteBench and LV-Eval; `longbench_data` and `longbench_metrics` are theirs
harness             the model in lm-evaluation-harness; `harness_arguments` are its options, `scoring` its likelihoods
cost                parameters, bytes of state and operations, by formula
latency             time a token, measured
full_report         all of these on one page
"""

__all__ = [
    "cost",
    "divergence",
    "divergence_report",
    "full_report",
    "haystacks",
    "harness",
    "latency",
    "longbench",
    "longbench_data",
    "questions",
    "recall",
    "recall_report",
]
