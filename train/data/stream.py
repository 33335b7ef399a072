"""Documents to batches: rows of a fixed length, mixtures of them, a shuffled, endless, resumable stream.

A row holds one piece of one document or, when packing, several, each starting on the grid of the memory's chunks.
`records` reads files, `documents` makes their tokens, `packing` decides which tokens stand in which row. Axes:

    B rows of a batch    L tokens of a row
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from train.data import documents as documents_lib
from train.data import encode, packing

Document = encode.Document
Documents = documents_lib.Documents
check_tokenizer = documents_lib.check_tokenizer
load_documents = documents_lib.load_documents

_ENDLESS = 2**40  # rows; grain's own endless repeat overflows the length of what is made from it


class Source(Protocol):
    """Random access to rows, each a dict of arrays [L] as `Rows` gives them."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, row: int, /) -> dict[str, np.ndarray]:
        """tokens, targets, segment_ids int32 [L] and mask bool [L]."""

    def content_hash(self) -> str:
        """What two runs on the same data agree on."""


class Rows:
    """Random access to rows cut from documents.

    Unpacked, a row is `length` + 1 consecutive tokens of one document, and tails that do not fill a row are left out.
    Packed, nothing is left out: pieces follow each other, each starting at a multiple of `align`, the gaps are padding.

    Args:
      documents: what to cut.
      length: L.
      align: None for one piece a row; else the chunk (the largest, if several are drawn) to align packed pieces to.
      piece: the longest piece, in tokens; None is L. Shorter ones need packing.
      response_only: keep the loss off everything that is not a response.

    Raises:
      ValueError: the lengths do not fit each other, or no document fills a row.
    """

    def __init__(
        self,
        documents: Documents | Sequence[Document],
        length: int,
        *,
        align: int | None = None,
        piece: int | None = None,
        response_only: bool = False,
    ):
        if align is not None and length % align:
            raise ValueError(f"seq_length={length} is not a multiple of the chunk {align} that packing aligns to")
        if piece is not None and not (1 <= piece <= length and (align is not None or piece == length)):
            raise ValueError(
                f"piece={piece} must be from 1 to seq_length={length}, and shorter than that only with pack"
            )
        self._documents = documents if isinstance(documents, Documents) else documents_lib.in_memory(documents)
        self._length, self._align, self._response_only = length, align or length, response_only
        self._settings = [length, align, piece or length, response_only]
        self._prefix = np.asarray(self._documents.prefix, np.int32)
        extra = len(self._prefix) * self._documents.prefixed.astype(np.int64)
        pieces = packing.cut(self._documents.lengths, extra, piece or length)
        if align is None:
            pieces = pieces.take(pieces.size == length)
        sizes = -(-pieces.size // self._align)
        rows = packing.pack(sizes, length // self._align)
        self._pieces = pieces.take(np.argsort(rows, kind="stable"))
        self._first = np.cumsum([0, *np.bincount(rows)])  # piece that each row starts with
        if not len(self):
            raise ValueError(
                f"no document has seq_length + 1 = {length + 1} tokens (the longest has "
                f"{self._documents.lengths.max()}): lower seq_length, give longer texts, or pack"
            )

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """tokens, targets, segment_ids int32 [L] (pieces numbered from 1, 0 is padding) and mask bool [L]."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        tokens, targets, segments = (np.zeros(self._length, np.int32) for _ in range(3))
        mask = np.zeros(self._length, bool)
        at = 0
        for number, index in enumerate(range(self._first[row], self._first[row + 1]), 1):
            document, start, count = (int(column[index]) for column in self._pieces)
            extra = len(self._prefix) if self._documents.prefixed[document] else 0
            ids, response = self._documents.take(document, start, start + count + 1 - extra)
            whole = np.concatenate([self._prefix[:extra], ids])
            learned = np.concatenate([np.zeros(extra, bool), response]) | (not self._response_only)
            here = slice(at, at + count)
            tokens[here], targets[here], mask[here], segments[here] = whole[:-1], whole[1:], learned[1:], number
            at += -(-count // self._align) * self._align
        return {"tokens": tokens, "targets": targets, "segment_ids": segments, "mask": mask}

    @property
    def padding(self) -> float:
        """Share of all positions that hold no token."""
        return 1 - float(self._pieces.size.sum()) / (len(self) * self._length)

    def largest_token(self) -> int:
        """The largest token id of the documents, for `check_tokenizer`."""
        return self._documents.largest_token()

    def content_hash(self) -> str:
        """sha256 of the files' hashes, and of how they are cut."""
        settings = [self._documents.content_hash(), *self._settings]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a mixture: texts, and how they are cut and learned from."""

    texts: tuple[str, ...] = ()
    """Files, or folders of them."""
    weight: float = 1.0
    """Share of the rows, beside the weights of the other parts."""
    piece: int | None = None
    """The longest piece of a document, in tokens; None is the row's length. Several pieces share a row."""
    response_only: bool = False
    """In chats, and in records of a prompt and its completion, take the loss on the answers only."""


class Mixture:
    """Rows of several parts, each cut and packed by itself, of which a `Stream` takes shares by weight.

    By number, the rows of the first part come first. See `load_documents` and `Rows` for the other arguments.

    Args:
      parts: what is mixed.
      length: L, of all parts, so that one program serves the whole run.
      tokenizer: of the model.
      cache: folder where tokens are kept.
      align: as in `Rows`.
      end_of_text: as in `load_documents`.

    Raises:
      ValueError: a part that has a weight that is not positive, no rows, or texts that cannot be used; it is named.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        length: int,
        tokenizer: encode.Tokenizer,
        cache: str | os.PathLike[str],
        *,
        align: int | None = None,
        end_of_text: bool = True,
    ):
        if not parts:
            raise ValueError("a mixture needs at least one part")
        load = functools.partial(load_documents, tokenizer=tokenizer, cache=cache, end_of_text=end_of_text)
        self.parts = tuple(_part_rows(part, length, load, align) for part in parts)
        self.weights = tuple(part.weight for part in parts)
        self._first = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """See `Rows`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self._first, row, "right")) - 1
        return self.parts[part][row - int(self._first[part])]

    @property
    def padding(self) -> float:
        """Share of the stream's positions that hold no token."""
        return float(np.average([rows.padding for rows in self.parts], weights=self.weights))

    def largest_token(self) -> int:
        """The largest token id of all parts, for `check_tokenizer`."""
        return max(rows.largest_token() for rows in self.parts)

    def content_hash(self) -> str:
        """sha256 of the parts' hashes and the weights."""
        parts = [[rows.content_hash(), weight] for rows, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _part_rows(part: Part, length: int, load: Callable[..., Documents], align: int | None) -> Rows:
    try:
        if not (part.weight > 0 and math.isfinite(part.weight)):
            raise ValueError(f"weight={part.weight} must be positive; take the part out instead")
        if not part.texts:
            raise ValueError("it has no texts; give it some")
        documents = load(part.texts)
        return Rows(documents, length, align=align, piece=part.piece, response_only=part.response_only)
    except ValueError as error:
        raise ValueError(f"the part of the mixture with texts={part.texts}: {error}") from error


class Stream(Iterator[dict[str, np.ndarray]]):
    """Batches without end, a function of rows, batch and seed alone: each part's rows are shuffled anew each epoch.

    Args:
      rows: a source, or a mixture of them.
      batch: rows of a step, over all processes.
      seed: of the shuffling.
      local: which rows of each batch this process loads, as a slice or their numbers; None is all. Whoever loads a row,
        step s has the same rows in the same order, so a run may go on with another number of processes.

    Raises:
      ValueError: no rows, or a `local` that is not within the batch.
    """

    def __init__(self, rows: Source, batch: int, *, seed: int, local: slice | Sequence[int] | None = None):
        if not len(rows) or batch < 1:
            raise ValueError(f"{len(rows)} rows in batches of {batch}: give at least one of each")
        chosen = _local_rows(local, batch)
        self._order, self._batch, self._local = _order(rows, seed), batch, chosen
        self.restore({"step": 0})

    def __next__(self) -> dict[str, np.ndarray]:
        """Each array of `Rows.__getitem__` with a leading B (of `local`, the number of those rows)."""
        batch = next(self._iterator)
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream stands: JSON values, the same on all processes."""
        return {"step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken, by any number of processes."""
        self._step = int(state["step"])
        batches = grain.MapDataset.source(_Batches(self._order, self._batch, self._local, self._step))
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))


class _Batches:
    """Random access to batches from a step on: `local` of each `batch` rows of an order."""

    def __init__(self, order: grain.MapDataset, batch: int, local: Sequence[int], step: int):
        self._order, self._batch, self._local, self._step = order, batch, local, step

    def __len__(self) -> int:
        return len(self._order) // self._batch - self._step

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = (self._step + index) * self._batch
        rows = [self._order[first + row] for row in self._local]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _local_rows(local: slice | Sequence[int] | None, batch: int) -> Sequence[int]:
    """Numbers of rows within a batch."""
    if local is None:
        return range(batch)
    if isinstance(local, slice):
        local = range(local.start or 0, batch if local.stop is None else local.stop, local.step or 1)
    if not local or min(local) < 0 or max(local) >= batch:
        raise ValueError(f"local={local} must be some rows of a batch of {batch}, from 0 to {batch - 1}")
    return local


def _order(rows: Source, seed: int) -> grain.MapDataset:
    """All rows that a run will ever see, in their order."""
    sources: Sequence[Source] = rows.parts if isinstance(rows, Mixture) else (rows,)
    shuffled = []
    for number, source in enumerate(sources):
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        shuffled.append(grain.MapDataset.source(source).seed(own).shuffle().repeat(_ENDLESS // len(source) + 1))
    return grain.MapDataset.mix(shuffled, rows.weights) if isinstance(rows, Mixture) else shuffled[0]
