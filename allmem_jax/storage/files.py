"""Files that are whole or not there."""

import contextlib
import os
import pathlib
import platform
import re
import time
import uuid

from allmem_jax.storage import stores

LONG = 3600  # seconds that no writing of a file takes


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file or a URL in one step, its folder too where it is missing; text as UTF-8.

    Whoever reads `path` meanwhile, or after this process was killed, finds the old content or the new one. Of several
    that write it at once, one is the last.
    """
    content = content.encode() if isinstance(content, str) else content
    if stores.is_url(path):
        return stores.write(path, content)
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep(folder: pathlib.Path) -> None:
    """Removes what processes that were killed left in a folder in the midst of `write`."""
    here = re.compile(rf"\..*\.{re.escape(platform.node())}-(\d+)-[0-9a-f]{{32}}\.partial")
    for left in folder.glob(".*.partial"):
        found = here.fullmatch(left.name)
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if (found and not stores.alive(int(found[1]))) or time.time() - left.stat().st_mtime > LONG:
                left.unlink()
