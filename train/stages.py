"""Long commands as stages, each of whose results is kept and found again."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from allmem_jax import files


def stage(path: pathlib.Path, what: str, work: Callable[[], Any]) -> Any:
    """The JSON value of `work`, or what an earlier run left of it at `path`."""
    if path.exists():
        say(f"{what}: reused from {path}")
        return json.loads(path.read_text())
    say(what)
    began = time.monotonic()
    value = work()
    files.write(path, json.dumps(value))
    say(f"  took {time.monotonic() - began:.0f} s")
    return value


def say(message: str) -> None:
    """Prints a line at once."""
    print(message, flush=True)
