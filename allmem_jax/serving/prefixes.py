"""States of beginnings that were read before: who asks with the same beginning reads only the rest.

A state is kept where a piece ended, under a hash of what was read to there. States are immutable, so one serves any
number of requests at once. Behind those in memory there may be a store (`prefix_store`): they are written to it, and
read from it before a request is in the engine's hands.
"""

import collections
import hashlib
import threading
from collections.abc import Sequence

import jax
import numpy as np

from allmem_jax.model import state as state_lib
from allmem_jax.serving import prefix_store


class Prefixes:
    """The most recently used states of beginnings, within a number of bytes."""

    def __init__(self, piece: int, limit: int, store: prefix_store.PrefixStore | None = None):
        """`piece`: tokens between states; `limit`: bytes to keep in memory at most, 0 for nothing."""
        self.piece, self.limit, self.store, self.held = piece, limit, store, 0
        self._entries: collections.OrderedDict[bytes, state_lib.DecodeState] = collections.OrderedDict()
        self._lock = threading.Lock()

    def keys(self, tokens: Sequence[int], origin: bytes) -> list[bytes]:
        """A key for each whole piece of `tokens`, which names all from `origin`, what came before them, to its end."""
        found, before = [], origin
        for start in range(0, len(tokens) - self.piece + 1, self.piece):
            part = np.asarray(tokens[start : start + self.piece], np.int32).tobytes()
            before = hashlib.sha256(before + part).digest()
            found.append(before)
        return found

    def longest(self, keys: Sequence[bytes]) -> tuple[int, state_lib.DecodeState | None]:
        """How many of the pieces were read before, and the state after them, of those in memory."""
        for count in range(len(keys), 0, -1):
            with self._lock:
                if (state := self._entries.get(keys[count - 1])) is not None:
                    self._entries.move_to_end(keys[count - 1])
            if state is not None:
                self._stored(keys[count - 1], state)
                return count, state
        return 0, None

    def keep(self, key: bytes, state: state_lib.DecodeState) -> None:
        """Keeps a state; those that were not used for longest make room."""
        self._stored(key, state)
        size = _bytes(state)
        with self._lock:
            if key in self._entries or size > self.limit:
                return
            self._entries[key] = state
            self.held += size
            while self.held > self.limit:
                _, dropped = self._entries.popitem(last=False)
                self.held -= _bytes(dropped)

    def fetch(self, keys: Sequence[bytes]) -> None:
        """Brings the longest beginning from the store into memory, as soon as it is read."""
        for key in reversed(keys):
            if key in self._entries or self.store is None:
                return
            if (state := self.store.load(key)) is not None:
                return self.keep(key, state)

    def _stored(self, key: bytes, state: state_lib.DecodeState) -> None:
        if self.store is not None:
            self.store.keep(key, state)

    def __len__(self) -> int:
        return len(self._entries)


def _bytes(state: state_lib.DecodeState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
