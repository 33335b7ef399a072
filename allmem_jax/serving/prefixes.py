"""States of beginnings that were read before: who asks with the same beginning reads only the rest.

A state is kept where a piece ended, under a hash of what was read to there. States are immutable, so one serves any
number of requests at once.
"""

import collections
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from allmem_jax.model import state as state_lib

Entry = tuple[state_lib.DecodeState, jax.Array]  # the state of one row and the logits [1, V] after it


class Prefixes:
    """The most recently used states of beginnings, within a number of bytes."""

    def __init__(self, piece: int, limit: int):
        """`piece`: tokens between states; `limit`: bytes to keep at most, 0 for nothing."""
        self.piece, self.limit, self.held = piece, limit, 0
        self._entries: collections.OrderedDict[bytes, Entry] = collections.OrderedDict()

    def keys(self, tokens: Sequence[int], origin: bytes) -> list[bytes]:
        """A key for each whole piece of `tokens`, which names all from `origin`, what came before them, to its end."""
        found, before = [], origin
        for start in range(0, len(tokens) - self.piece + 1, self.piece):
            part = np.asarray(tokens[start : start + self.piece], np.int32).tobytes()
            before = hashlib.sha256(before + part).digest()
            found.append(before)
        return found

    def longest(self, keys: Sequence[bytes]) -> tuple[int, Entry | None]:
        """How many of the pieces were read before, and the state after them."""
        for count in range(len(keys), 0, -1):
            if (entry := self._entries.get(keys[count - 1])) is not None:
                self._entries.move_to_end(keys[count - 1])
                return count, entry
        return 0, None

    def keep(self, key: bytes, state: state_lib.DecodeState, logits: jax.Array) -> None:
        """Keeps a state; those that were not used for longest make room."""
        size = _bytes((state, logits))
        if key in self._entries or size > self.limit:
            return
        self._entries[key] = (state, logits)
        self.held += size
        while self.held > self.limit:
            _, dropped = self._entries.popitem(last=False)
            self.held -= _bytes(dropped)

    def __len__(self) -> int:
        return len(self._entries)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
