"""How a program ends when it cannot do what it is asked: one line on stderr, and exit code 2 as for a bad option."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line(*more: type[Exception]) -> Iterator[None]:
    """Ends the program so at an error that was to be expected, or one of the kinds `more`."""
    expected: tuple[type[Exception], ...] = (ValueError, OSError, FloatingPointError, *more)
    try:
        yield
    except expected as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        hint = "; free some space and give the same command: what is complete is kept" if full else ""
        print(f"error: {error}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
