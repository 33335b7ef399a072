"""Texts that were read once, by name: their states lie in a folder or an object store, and requests go on from them.

A memory is two files, NAME.ID.state (`allmem_jax.save_state`) and NAME.json, which says its id, its model and what it
has read. The second is written last, so that a memory is there as a whole or not at all, and of several that
servers make of one name at once one is the last.
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
from allmem_jax.serving import engine, prefix_store
from allmem_jax.storage import files, stores

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{32}")
_STATE = re.compile(rf"({NAME.pattern})\.{_ID.pattern}\.state")  # nothing else at the place is removed
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
    """The memories at one place that are of one model."""

    def __init__(self, place: stores.AnyPath, config: config_lib.ModelConfig, model: str):
        """`place` is a folder, made when the first is kept, or a URL; `model` is the fingerprint of the model.

        What a server that was killed left half-written is removed.
        """
        self.place, self.config, self.model = place, config, model
        if not stores.is_url(place):
            files.sweep(pathlib.Path(place))
        self._writing = threading.Lock()
        self._load = functools.lru_cache(_HELD)(self._read)
        self._tidy()

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
        with self._writing:  # of several of one name here each removes the one before it
            before = self.describe(name)
            about["bytes"] = state_lib.save_state(stores.join(self.place, _state(about)), self.config, state)
            files.write(stores.join(self.place, f"{name}.json"), json.dumps(about))
            if before is not None:
                self._drop(_state(before))
        return about

    def describe(self, name: str) -> dict[str, Any] | None:
        """What is known of a memory; None where there is none of this name.

        Raises:
          ValueError: it is no name.
          OSError: the place cannot be read.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a memory: letters, digits, dots, dashes, at most 64")
        try:
            about = json.loads(stores.read(stores.join(self.place, f"{name}.json")))
        except (FileNotFoundError, ValueError):
            return None
        ours = isinstance(about, dict) and about.get("name") == name and _ID.fullmatch(str(about.get("id")))
        return about if ours else None

    def all(self) -> list[dict[str, Any]]:
        """What is known of every memory of this model, by name."""
        names = sorted(file.removesuffix(".json") for file in stores.names(self.place) if file.endswith(".json"))
        found = map(self.describe, filter(NAME.fullmatch, names))
        return [about for about in found if about and about.get("model") == self.model]

    def start(self, name: str) -> engine.Start | None:
        """What a request with this memory goes on from; None where there is none of this name.

        Raises:
          ValueError: it is damaged, or another model's.
          OSError: the place cannot be read.
        """
        for _ in range(2):  # the first may be replaced between its two files
            about = self.describe(name)
            if about is None:
                break
            if about.get("model") != self.model:
                raise ValueError(f"memory {name!r} was made by another model: read its text again with this one")
            with contextlib.suppress(FileNotFoundError):
                return self._load(name, about["id"])
        return None

    def remove(self, name: str) -> bool:
        """Deletes a memory; False where there is none. Requests that go on from it are not disturbed."""
        about = self.describe(name)
        if about is None:
            return False
        self._drop(f"{name}.json")
        self._drop(_state(about))
        return True

    def _tidy(self) -> None:
        """Removes states that no memory has, if they are so old that none is about to."""
        for file, (_, written) in stores.listed(self.place).items():
            found = _STATE.fullmatch(file)
            if found and time.time() - written > files.LONG:
                about = self.describe(found[1])
                if about is None or _state(about) != file:
                    self._drop(file)

    def _drop(self, file: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # another was first
            stores.remove(self.place, [file])

    def _read(self, name: str, which: str) -> engine.Start:
        """A memory as it was made with the id `which`, which no other has, nor the same name when it is made anew."""
        path = stores.join(self.place, f"{name}.{which}.state")
        try:
            return engine.Start(prefix_store.read_state(path, self.config), which.encode())
        except ValueError as error:
            raise ValueError(f"memory {name!r} cannot be used: {error}. Read its text again") from None


def _state(about: dict[str, Any]) -> str:
    """The file of a memory's state."""
    return f"{about['name']}.{about['id']}.state"
