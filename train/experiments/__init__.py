"""Programs that measure: the demo, and what the documents' figures come from.

demo, reading         the whole chain on a real model
recall, recall_grid   recall beyond the window, from scratch
evidence              every mixer distilled, beside its control
compare               what the window alone loses
peers                 speed beside transformers
overhead              what the loop costs beside its steps
"""

__all__ = []
