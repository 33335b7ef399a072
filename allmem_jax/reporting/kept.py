"""Long work in parts: the result of each is kept under all that it depends on, and found again by that alone."""

import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import allmem_jax
from allmem_jax.storage import files


def say(message: str) -> None:
    """Prints a line at once."""
    print(message, flush=True)


def key(depends: Any) -> str:
    """A short name for JSON values and, as results depend on code too, the version of this package."""
    content = [allmem_jax.__version__, depends]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def result(
    folder: pathlib.Path,
    name: str,
    depends: Any,
    work: Callable[[], Any],
    *,
    what: str = "",
    say: Callable[[str], Any] = say,
) -> Any:
    """The JSON value of `work`, or what an earlier run left of it.

    Args:
      folder: of the results.
      name: of this one; with a key it names the file.
      depends: all that the value depends on beside what `folder` stands for, and nothing else: JSON values.
      work: makes the value.
      what: is being done, for people; `name` where it is empty.
      say: tells them.

    Raises:
      ValueError: what is there is no result.
    """
    path, what = folder / f"{name}-{key(depends)}.json", what or name
    if path.exists():
        say(f"{what}: reused from {path}")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a result of this command: {error}; delete it") from None
    say(f"{what} ...")
    began = time.monotonic()
    content = json.dumps(work(), indent=1)
    files.write(path, content)
    say(f"  took {time.monotonic() - began:.0f} s")
    return json.loads(content)
