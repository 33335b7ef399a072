"""Which implementation of a kernel runs."""

BACKENDS = ("xla", "pallas", "triton", "reference")


def choose(op: str, implementation: str | None) -> str:
    """Returns the backend that serves `implementation`; None means the best one, which is "xla" for now.

    Args:
      op: name of the kernel, for messages.
      implementation: one of `BACKENDS`, or None.

    Raises:
      NotImplementedError: the backend is known but cannot serve this kernel. A named backend is never replaced.
      ValueError: the name is unknown.
    """
    if implementation is None:
        return "xla"
    if implementation in ("pallas", "triton"):
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} is not built yet; use implementation='xla', or None for the best"
        )
    if implementation not in BACKENDS:
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; use None or one of {BACKENDS}")
    return implementation
