"""Texts that were read once, by name: their states lie in a folder, and any request may go on from one.

A memory is one file, NAME.state (`allmem_jax.save_state`), and NAME.json beside it, which says of which model it is and
what it has read. The second is written last, so that a memory is there as a whole or not at all.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
import re
import threading
import time
import uuid
from typing import Any

import jax
import numpy as np

from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.model import state as state_lib
from allmem_jax.serving import engine
from allmem_jax.storage import files

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HELD = 16  # memories that stay loaded
_SAMPLE = 4096  # elements of an array that tell one model from another


def fingerprint(params: lm.Params, config: config_lib.ModelConfig) -> str:
    """What tells a model from others: its config, and some elements of every array."""
    digest = hashlib.sha256(config.to_json().encode())
    for leaf in jax.tree.leaves(params):
        some = leaf.reshape(-1)[:: max(1, leaf.size // _SAMPLE)]
        digest.update(np.asarray(some, np.float32).tobytes())
    return digest.hexdigest()[:16]


class Memories:
    """The memories in one folder that are of one model."""

    def __init__(self, folder: pathlib.Path, config: config_lib.ModelConfig, model: str):
        """`folder` is made when the first is kept; `model` is the fingerprint of the model.

        What a server that was killed left half-written is removed.
        """
        self.folder, self.config, self.model = folder, config, model
        self._writing = threading.Lock()
        files.sweep(folder)
        for state in folder.glob("*.state"):
            if not state.with_suffix(".json").exists() and files.old(state):
                state.unlink(missing_ok=True)
        self._load = functools.lru_cache(_HELD)(self._read)

    def keep(self, name: str, state: state_lib.DecodeState, tokens: int) -> dict[str, Any]:
        """Writes a memory, in the place of one of the same name; returns what `describe` does."""
        about = {
            "name": name,
            "id": uuid.uuid4().hex,
            "model": self.model,
            "tokens": tokens,
            "position": int(state.position[0]),
            "created": int(time.time()),
        }
        path = self._path(name)
        with self._writing:  # of two of one name both files are one's
            path.with_suffix(".json").unlink(missing_ok=True)
            about["bytes"] = state_lib.save_state(path, self.config, state)
            files.write(path.with_suffix(".json"), json.dumps(about))
        return about

    def describe(self, name: str) -> dict[str, Any] | None:
        """What is known of a memory; None where there is none of this name. ValueError where it is no name."""
        path = self._path(name).with_suffix(".json")
        try:
            about = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return about if isinstance(about, dict) and about.get("name") == name else None

    def all(self) -> list[dict[str, Any]]:
        """What is known of every memory of this model, by name."""
        names = sorted(path.stem for path in self.folder.glob("*.json") if NAME.fullmatch(path.stem))
        return [about for about in map(self.describe, names) if about and about.get("model") == self.model]

    def start(self, name: str) -> engine.Start | None:
        """What a request with this memory goes on from; None where there is none of this name.

        Raises:
          ValueError: it is damaged, or another model's.
        """
        about = self.describe(name)
        if about is None:
            return None
        if about.get("model") != self.model:
            raise ValueError(f"memory {name!r} was made by another model: read its text again with this one")
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            return self._load(name, str(about.get("id")))
        return None

    def remove(self, name: str) -> bool:
        """Deletes a memory; False where there is none. Requests that go on from it are not disturbed."""
        there = self.describe(name) is not None
        for suffix in (".json", ".state"):
            self._path(name).with_suffix(suffix).unlink(missing_ok=True)
        return there

    def _read(self, name: str, which: str) -> engine.Start:
        """A memory as it was made with the id `which`, which no other has, nor the same name when it is made anew."""
        return engine.Start(state_lib.load_state(self._path(name), self.config), which.encode())

    def _path(self, name: str) -> pathlib.Path:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a memory: letters, digits, dots, dashes, at most 64")
        return self.folder / f"{name}.state"
