"""Which tokens stand in which row, as arithmetic on arrays: documents are cut into pieces, pieces put into rows.

D documents    P pieces
"""

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """Pieces of documents; each array int64 [P].

    Attributes:
      document: whose tokens.
      start: the first of them.
      size: positions that a piece takes in a row, the prefix included; it has one more token, the last target.
    """

    document: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def take(self, chosen: np.ndarray) -> "Pieces":
        """Some of them, by bool [P] or by number."""
        return Pieces(self.document[chosen], self.start[chosen], self.size[chosen])


def cut(lengths: np.ndarray, extra: np.ndarray, longest: int) -> Pieces:
    """Cuts documents into pieces of `longest` positions, the last of each document shorter; nothing is left out.

    Args:
      lengths: int64 [D], tokens of each document.
      extra: int64 [D], tokens that each piece of it starts with besides.
      longest: the most positions of a piece, more than `extra`.
    """
    if np.any(extra >= longest):
        raise ValueError(
            f"a piece of {longest} tokens has no room beside the {extra.max()} tokens that each starts with"
        )
    inputs = np.maximum(lengths - 1, 0)  # the last token is a target only
    step = longest - extra
    pieces = -(-inputs // step)
    document = np.repeat(np.arange(len(lengths)), pieces)
    ordinal = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = ordinal * step[document]
    return Pieces(document, start, np.minimum(longest, extra[document] + inputs[document] - start))


def pack(sizes: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece, int64 [P]: the fullest open row that has room for it, or a new one. In pieces' order.

    Args:
      sizes: int64 [P], from 1 to `room`.
      room: size of a row.
    """
    rows = np.empty(len(sizes), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that is left
    rooms, count = 0, 0  # bit r of `rooms` is set where a row has room r left
    for index, size in enumerate(sizes.tolist()):
        if fitting := rooms >> size << size:
            left = (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                rooms ^= 1 << left
        else:
            left, row, count = room, count, count + 1
        rows[index] = row
        if left := left - size:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows
