"""States of beginnings in a folder or an object store: they outlast a server, and all servers of one store share them.

A state is one file, MODEL/KEY.state (`allmem_jax.save_state`); MODEL is the model's fingerprint, KEY names all that the
state has read. One thread writes them, lists them and makes room, and requests read them in threads of their own, so
that the engine waits for none of it: what comes faster than it can be written is not written.
"""

import collections
import contextlib
import logging
import pathlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from allmem_jax.model import config as config_lib
from allmem_jax.model import state as state_lib
from allmem_jax.storage import files, stores

_OURS = re.compile(r"[0-9a-f]{16}/[0-9a-f]{64}\.state")  # nothing else in the folder is counted or removed
_WAITING = 16  # states that wait to be written
_LISTED = 30.0  # seconds after which what others wrote is looked for
_FRESH = 3600.0  # seconds in which a state that is used need not be written again to be known as used
_ROOM = 0.9  # of the limit is filled after room was made, so that it is not made for every state
_LOG = logging.getLogger(__name__)


class PrefixStore:
    """The states of one model's beginnings at a place that others may use too; it has a thread between start and stop.

    A state that is used is written again once an hour, as stores know when a file was written and not when it was read.
    """

    def __init__(self, place: stores.AnyPath, config: config_lib.ModelConfig, model: str, limit: int):
        """`place`: folder or URL; `model`: the fingerprint of the model; `limit`: bytes of all models' states there."""
        if limit < (size := state_lib.state_bytes(config)):
            raise ValueError(f"{limit} bytes for states in {place} hold none, which has {size}: give more")
        self.place, self.config, self.model, self.limit = place, config, model, limit
        self.held = 0  # bytes that are there, as far as is known
        self._known: dict[str, float] = {}  # when each of this model's states was written
        self._waiting: collections.OrderedDict[str, state_lib.DecodeState] = collections.OrderedDict()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="allmem-prefixes", daemon=True)

    def start(self) -> None:
        """Starts the thread, which looks first for what is there."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread when it has written what waits, or in some seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(5)

    def keep(self, key: bytes, state: state_lib.DecodeState) -> None:
        """Has a state of one row written, unless that was done of late; returns at once.

        Where too many wait, the one that waits longest is not written.
        """
        name = self._name(key)
        if time.time() - self._known.get(name, 0) < _FRESH:
            return
        with self._wake:
            self._waiting[name] = state
            while len(self._waiting) > _WAITING:
                self._waiting.popitem(last=False)
            self._wake.notify()

    def load(self, key: bytes) -> state_lib.DecodeState | None:
        """A state, as soon as it is read; None where there is none. One that is damaged is removed."""
        name = self._name(key)
        if name not in self._known:
            return None
        try:
            return read_state(stores.join(self.place, name), self.config)
        except FileNotFoundError:  # removed by another server
            pass
        except ValueError as error:
            _LOG.warning("%s; it is removed", error)
            with contextlib.suppress(OSError):
                stores.remove(self.place, [name])
        except OSError as error:
            _LOG.warning("%s", error)
        self._known.pop(name, None)
        return None

    def _name(self, key: bytes) -> str:
        return f"{self.model}/{key.hex()}.state"

    def _run(self) -> None:
        if not stores.is_url(self.place):
            for folder in pathlib.Path(self.place).glob("*/"):
                files.sweep(folder)
        due = 0.0
        while True:
            if time.monotonic() >= due:
                self._attempt(self._look)
                due = time.monotonic() + _LISTED
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._stopping, max(0.0, due - time.monotonic()))
                if self._stopping and not self._waiting:
                    return
                item = self._waiting.popitem(last=False) if self._waiting else None
            if item is not None:
                self._attempt(self._write, *item)

    def _attempt(self, what: Callable[..., Any], *given: Any) -> None:
        """Does what may fail without harm: a store that cannot be reached makes the server slower, no more."""
        try:
            what(*given)
        except (OSError, ValueError) as error:
            _LOG.warning("%s", error)

    def _look(self) -> dict[str, tuple[int, float]]:
        """Bytes and time of writing of all states that are there now."""
        found = {name: about for name, about in stores.listed(self.place).items() if _OURS.fullmatch(name)}
        self.held = sum(size for size, _ in found.values())
        self._known = {name: at for name, (_, at) in found.items() if name.startswith(f"{self.model}/")}
        return found

    def _write(self, name: str, state: state_lib.DecodeState) -> None:
        size = state_lib.save_state(stores.join(self.place, name), self.config, state)
        self.held += 0 if name in self._known else size
        self._known[name] = time.time()
        if self.held > self.limit:
            self._make_room()

    def _make_room(self) -> None:
        """Removes those that were not used for longest, and never the last."""
        found = self._look()
        for name, (size, _) in sorted(found.items(), key=lambda item: item[1][1])[:-1]:
            if self.held <= self.limit * _ROOM:
                return
            with contextlib.suppress(FileNotFoundError):  # another server was first
                stores.remove(self.place, [name])
            self._known.pop(name, None)
            self.held -= size


def read_state(path: stores.AnyPath, config: config_lib.ModelConfig) -> state_lib.DecodeState:
    """The state of one row in a file or at a URL, of which no copy is kept.

    Raises:
      FileNotFoundError, OSError: it is not there; the place cannot be read.
      ValueError: it is damaged, or of another model.
    """
    with contextlib.ExitStack() as stack:
        if stores.is_url(path):  # `stores.local` would keep its copy
            copy = stack.enter_context(stores.scratch(pathlib.PurePosixPath(str(path)).name))
            copy.write_bytes(stores.read(path))
            path = copy
        state = state_lib.load_state(path, config)
    state_lib.check_state(config, 1, state)
    return state
