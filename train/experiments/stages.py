"""Long commands as stages: the result of each is kept under what it depends on, and found again by that alone."""

import dataclasses
import hashlib
import json
import pathlib
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

from allmem_jax.storage import files


def stage(folder: pathlib.Path, name: str, depends: Any, what: str, work: Callable[[], Any]) -> Any:
    """The JSON value of `work`, or what an earlier run left of it.

    Args:
      folder: of the results.
      name: of the stage.
      depends: all that the value depends on beside what `folder` stands for, and nothing else: JSON values.
      what: is being done, for people.
      work: makes the value.
    """
    path = folder / f"{name}-{key(depends)}.json"
    if path.exists():
        say(f"{what}: reused from {path}")
        return json.loads(path.read_text())
    say(what)
    began = time.monotonic()
    value = work()
    files.write(path, json.dumps(value))
    say(f"  took {time.monotonic() - began:.0f} s")
    return value


def key(depends: Any) -> str:
    """A short name for JSON values."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:10]


def command(program: str, settings: Any, positional: Sequence[str] = ()) -> str:
    """The command line that gives `settings` (a dataclass) again: its fields that are not at their defaults.

    `positional` are the fields that are given without their names; they come first.
    """
    words = ["python", "-m", program]
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in positional):
        value = getattr(settings, field.name)
        if value != field.default:
            words += [] if field.name in positional else [f"--{field.name}"]
            words += map(str, value if isinstance(value, tuple) else [value])
    return shlex.join(words)


def say(message: str) -> None:
    """Prints a line at once."""
    print(message, flush=True)
