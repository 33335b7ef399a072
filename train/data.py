"""Long text to batches: files -> documents -> rows of a fixed length -> a shuffled, endless, resumable stream.

A document is a .txt file or a line of a .jsonl file, {"text": ...} or {"messages": [...]} (rendered with the
tokenizer's chat template; the loss is then on the assistant's turns). A row holds one piece of one document, or, when
packing, several, each starting on the grid of the memory's chunks. Axes:

    B batch    L tokens of a row
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any:
        """A conversation as one string (tokenize=False)."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One document's tokens.

    Attributes:
      name: where it is from, for errors.
      tokens: int32 [n].
      response: bool [n], the tokens that a loss on responses alone is about; all of them in plain text.
      prefix: what every piece cut from it starts with: the begin-of-sequence token, where the tokenizer has one.
    """

    name: str
    tokens: np.ndarray
    response: np.ndarray
    prefix: tuple[int, ...] = ()


def load_documents(paths: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, cache: Path) -> list[Document]:
    """Every document of the files, or of the .txt and .jsonl files in the folders, in a fixed order.

    Args:
      paths: files or folders.
      tokenizer: of the model.
      cache: folder where tokens of plain text are kept as .npy, by content and tokenizer.

    Raises:
      ValueError: nothing found, or a file that is empty, not UTF-8 or not what its suffix says.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"no text at {path}: give .txt or .jsonl files, or folders of them")
        found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"no .txt or .jsonl file in {path}")
        files += found
    documents: list[Document] = []
    for file in files:
        text = _read(file)
        if file.suffix == ".jsonl":
            documents += _read_jsonl(file, text, tokenizer)
        else:
            documents.append(_plain(str(file), _cached_tokens(text, tokenizer, cache), tokenizer))
    return documents


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def _plain(name: str, tokens: np.ndarray, tokenizer: Tokenizer) -> Document:
    return Document(name, tokens, np.ones(tokens.shape, bool), tuple(tokenizer.encode("")))


def _cached_tokens(text: str, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """Token ids int32 [n] of a text, from the cache when it was tokenised before."""
    digest = hashlib.sha256(tokenizer_hash(tokenizer).encode() + text.encode()).hexdigest()
    file = cache / f"{digest}.npy"
    if not file.exists():
        tokens = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{digest}.{os.getpid()}.partial.npy"
        np.save(partial, tokens, allow_pickle=False)
        os.replace(partial, file)
    return np.load(file, allow_pickle=False)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of all that a fast tokenizer consists of; of its class name where it is not one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return hashlib.sha256((type(tokenizer).__name__ if backend is None else backend.to_str()).encode()).hexdigest()


def _read_jsonl(file: Path, text: str, tokenizer: Tokenizer) -> list[Document]:
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name = f"{file}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON: {error}") from None
        if isinstance(record, dict) and isinstance(record.get("messages"), list):
            documents.append(chat_document(name, record["messages"], tokenizer))
        elif isinstance(record, dict) and isinstance(record.get("text"), str) and record["text"].strip():
            tokens = np.asarray(tokenizer.encode(record["text"], add_special_tokens=False), np.int32)
            documents.append(_plain(name, tokens, tokenizer))
        else:
            raise ValueError(f'{name} has neither a non-empty "text" nor a list of "messages"')
    return documents


def chat_document(name: str, messages: list[dict[str, str]], tokenizer: Tokenizer) -> Document:
    """A conversation in the tokenizer's chat template, with `response` on what the assistant says and ends with.

    Each turn is what it adds to the rendering of the turns before, so the text is that of the template; tokens never
    cross from a prompt into a response, as in generation.
    """
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f'{name}: a message needs a "role" and a "content", both text; got {message!r}')
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{name} has no message of the assistant to learn from")
    done, parts = "", []  # text so far, and (token ids, is a response)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, prompt in ((turn, True), (turn + 1, False)):
            text = tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=prompt, tokenize=False)
            if not text.startswith(done):
                raise ValueError(
                    f"{name}: the chat template renders earlier turns differently once turn {turn + 1} is added; "
                    "split the conversation so that each record ends at one response"
                )
            parts.append((tokenizer.encode(text[len(done) :], add_special_tokens=False), not prompt))
            done = text
    tokens = np.asarray([token for ids, _ in parts for token in ids], np.int32)
    response = np.asarray([flag for ids, flag in parts for _ in ids], bool)
    return Document(name, tokens, response)


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
    Packed, pieces follow each other, each starting at a multiple of `align`, and the gaps are padding.

    Args:
      documents: what to cut.
      length: L.
      align: None for one piece a row; else the chunk (the largest, if several are drawn) to align packed pieces to.
      response_only: keep the loss off everything that is not a response.
    """

    def __init__(
        self, documents: Sequence[Document], length: int, *, align: int | None = None, response_only: bool = False
    ):
        if align is not None and length % align:
            raise ValueError(f"seq_length={length} is not a multiple of the chunk {align} that packing aligns to")
        self._documents, self._length, self._response_only = documents, length, response_only
        pieces = []  # document, first token, number of inputs
        for index, document in enumerate(documents):
            extra = len(document.prefix)
            for start in range(0, len(document.tokens) - 1, length - extra):
                pieces.append((index, start, min(length, extra + len(document.tokens) - 1 - start)))
        if align is None:
            self._rows = [[piece] for piece in pieces if piece[2] == length]
        else:
            self._rows = _pack(pieces, length, align)
        self._align = align or length
        if not self._rows:
            longest = max((len(document.tokens) for document in documents), default=0)
            raise ValueError(
                f"no document has seq_length + 1 = {length + 1} tokens (the longest has {longest}): "
                "lower seq_length, give longer texts, or pack"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def content_hash(self) -> str:
        """sha256 of all tokens and masks in their order: what two runs on the same data agree on."""
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(f"{len(document.tokens)} {document.prefix}".encode())
            digest.update(document.tokens.tobytes() + document.response.tobytes())
        return digest.hexdigest()

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """tokens, targets, segment_ids int32 [L] (pieces numbered from 1, 0 is padding) and mask bool [L]."""
        length = self._length
        tokens, targets, segments = (np.zeros(length, np.int32) for _ in range(3))
        mask = np.zeros(length, bool)
        at = 0
        for number, (index, start, count) in enumerate(self._rows[row], 1):
            document, here = self._documents[index], slice(at, at + count)
            taken = slice(start, start + count + 1 - len(document.prefix))
            whole = np.concatenate([np.asarray(document.prefix, np.int32), document.tokens[taken]])
            response = np.concatenate([np.zeros(len(document.prefix), bool), document.response[taken]])
            tokens[here], targets[here] = whole[:-1], whole[1:]
            mask[here] = response[1:] | (not self._response_only)
            segments[here] = number
            at += -(-count // self._align) * self._align
        return {"tokens": tokens, "targets": targets, "segment_ids": segments, "mask": mask}


def _pack(pieces: list[tuple[int, int, int]], length: int, align: int) -> list[list[tuple[int, int, int]]]:
    """Pieces in their order into rows of `length`, each taking a multiple of `align`."""
    rows: list[list[tuple[int, int, int]]] = []
    room = 0
    for piece in pieces:
        size = -(-piece[2] // align) * align
        if size > room:
            rows.append([])
            room = length
        rows[-1].append(piece)
        room -= size
    return rows


class Stream(Iterator[dict[str, np.ndarray]]):
    """Batches without end: rows shuffled anew each epoch, this process's share of them, by `seed` alone.

    Args:
      rows: the source.
      batch: rows of a batch of this process.
      seed: of the shuffling.
      process, processes: which share of the rows this process takes.
    """

    def __init__(self, rows: Source, batch: int, *, seed: int, process: int = 0, processes: int = 1):
        if len(rows) < processes:
            raise ValueError(f"{len(rows)} rows cannot be shared among {processes} processes: give more text")
        dataset = grain.MapDataset.source(rows).seed(seed).shuffle()[process::processes]
        dataset = dataset.repeat(1_000_000).batch(batch)  # an unbounded repeat overflows grain's length
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __next__(self) -> dict[str, np.ndarray]:
        """Each array of `Rows.__getitem__` with a leading B."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Where the stream stands: JSON values."""
        return self._iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken."""
        self._iterator.set_state(state)
