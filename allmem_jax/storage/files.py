"""Files that are whole or not there."""

import os
import pathlib

from allmem_jax.storage import stores


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file or a URL in one step, its folder too where it is missing; text as UTF-8.

    Whoever reads `path` meanwhile, or after this process was killed, finds the old content or the new one.
    """
    content = content.encode() if isinstance(content, str) else content
    if stores.is_url(path):
        return stores.write(path, content)
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, target)
