"""Files to documents: the tokens of every file, made once and kept as memory-mapped .npy under the file's hash.

In the cache folder a file is three, named by sha256 of its content and of the tokenizer:

    HASH.tokens.npy       uint32 [N], a token's id, plus 2**31 where a loss on responses alone looks at it
    HASH.documents.npy    int64 [D, 4]: first token, number of tokens, 1 where pieces start with the prefix, record
    HASH.json             N, D and the largest id; written last, so what it does not match is made again

    N tokens of a file    D documents of a file    n tokens of a document
"""

import array
import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from allmem_jax.storage import stores
from train.data import encode, records

_FORMAT = 3  # of the cache
_ID, _RESPONSE = np.uint32(2**31 - 1), np.uint32(2**31)
_COLUMNS = 4


class Shard(NamedTuple):
    """The documents of one file, as the cache has them.

    Attributes:
      file: for errors.
      digest: of content and tokenizer.
      words: uint32 [N], HASH.tokens.npy.
      table: int64 [D, 4], HASH.documents.npy.
      largest: the largest token id.
    """

    file: str
    digest: str
    words: np.ndarray
    table: np.ndarray
    largest: int


class Documents:
    """Documents of many files by number, over memory maps: a document's tokens exist when they are asked for.

    Attributes:
      lengths: int64 [all D], tokens of each.
      prefixed: bool [all D], whether pieces cut from it start with the prefix.
      prefix: what those start with.
    """

    def __init__(self, shards: Sequence[Shard], prefix: tuple[int, ...]):
        self.prefix = prefix
        self.lengths = np.concatenate([shard.table[:, 1] for shard in shards])
        self.prefixed = np.concatenate([shard.table[:, 2] for shard in shards]).astype(bool)
        self._shards = shards
        self._first = np.cumsum([0, *(len(shard.table) for shard in shards)])  # document of each shard

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[encode.Document]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> encode.Document:
        """One document, read whole."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard, row = self._find(index)
        tokens, response = self.take(index, 0, int(self.lengths[index]))
        where = records.name(shard.file, int(shard.table[row, 3]))
        return encode.Document(where, tokens, response, self.prefix if self.prefixed[index] else ())

    def take(self, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [stop - start] of a document, and bool [stop - start], which of them are a response."""
        shard, row = self._find(index)
        first = int(shard.table[row, 0])
        words = shard.words[first + start : first + min(stop, int(self.lengths[index]))]
        return (words & _ID).astype(np.int32), words >= _RESPONSE

    def _find(self, index: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        return self._shards[shard], index - int(self._first[shard])

    def largest_token(self) -> int:
        """The largest token id, of the prefix too."""
        return max(*(shard.largest for shard in self._shards), *self.prefix, 0)

    def content_hash(self) -> str:
        """sha256 of the files' hashes in their order, and the prefix."""
        parts = [*(shard.digest for shard in self._shards), str(self.prefix)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def in_memory(documents: Sequence[encode.Document]) -> Documents:
    """The same for documents that exist already; they must agree on the prefix, where they have one."""
    prefixes = {document.prefix for document in documents if document.prefix}
    if not documents or len(prefixes) > 1:
        raise ValueError(f"{len(documents)} documents with prefixes {sorted(prefixes)}: give some, with one prefix")
    words = np.concatenate([_words(document) for document in documents])
    lengths = [len(document) for document in documents]
    table = np.asarray(
        [np.cumsum([0, *lengths])[:-1], lengths, [bool(d.prefix) for d in documents], range(1, len(documents) + 1)]
    ).T
    digest = hashlib.sha256(words.tobytes() + table.tobytes()).hexdigest()
    largest = int((words & _ID).max(initial=0))
    return Documents([Shard("documents", digest, words, table, largest)], next(iter(prefixes), ()))


def load_documents(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: encode.Tokenizer,
    cache: str | os.PathLike[str],
    *,
    end_of_text: bool = True,
) -> Documents:
    """Every document of the files, or of those in the folders, in a fixed order; see `records` for what is read.

    Args:
      paths: files or folders.
      tokenizer: of the model.
      cache: folder where tokens are kept; files that have none there are tokenised now.
      end_of_text: whether plain text ends with the tokenizer's end-of-text token, where it has one.

    Raises:
      ValueError: a file or a record that cannot be used, or a cache folder that cannot be written.
    """
    found = records.find(paths)
    folder = stores.local_only(cache, "cache")
    ends = encode.edges(tokenizer, end_of_text)
    shards = []
    for file, digest in digests(found, tokenizer, ends):
        shard = open_shard(file, digest, folder)
        shards.append(tokenise(file, digest, tokenizer, ends, folder) if shard is None else shard)
    return Documents(shards, ends.prefix)


def digests(files: Sequence[Path], tokenizer: encode.Tokenizer, ends: encode.Edges) -> list[tuple[Path, str]]:
    """Each file with its name in the cache. Files are read in pieces, several at a time."""
    of_tokenizer = tokenizer_hash(tokenizer)

    def digest(file: Path) -> str:
        try:
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        parts = f"{_FORMAT} {records.kind(file)} {content} {of_tokenizer} {ends.prefix} {ends.end}"
        return hashlib.sha256(parts.encode()).hexdigest()

    with futures.ThreadPoolExecutor() as pool:
        hashes = pool.map(digest, files)
        bar = tqdm.tqdm(hashes, desc="hashing files", total=len(files), delay=2, leave=False, disable=None)
        return list(zip(files, bar, strict=True))


def tokenizer_hash(tokenizer: encode.Tokenizer) -> str:
    """sha256 of what decides on tokens, beside `encode.Edges`.

    It is of all of a fast tokenizer, else of its class and vocabulary, of the chat template, and of the special tokens
    that a template may write.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = getattr(tokenizer, "get_vocab", dict)() if backend is None else backend.to_str()
    template = getattr(tokenizer, "chat_template", None)
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    parts = [type(tokenizer).__name__, vocabulary, template, special]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_shard(file: Path, digest: str, cache: Path) -> Shard | None:
    """A file's tokens as memory maps; None where the cache has none, or not all of them."""
    try:
        info = json.loads((cache / f"{digest}.json").read_text())
        words, table = (
            np.asarray(np.load(cache / f"{digest}.{part}.npy", mmap_mode="r", allow_pickle=False))
            for part in ("tokens", "documents")
        )
        whole = words.shape == (info["tokens"],) and table.shape == (info["documents"], _COLUMNS)
        return Shard(str(file), digest, words, table, int(info["largest"])) if whole else None
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None


def tokenise(
    file: Path, digest: str, tokenizer: encode.Tokenizer, ends: encode.Edges, cache: Path, *, quiet: bool = False
) -> Shard:
    """Makes the tokens of a file and keeps them, record by record; `quiet` shows no progress.

    Raises:
      ValueError: a bad record, or no space: then nothing is left of this file, and other files' tokens stay.
    """
    partial = {part: cache / f"{digest}.{part}.{uuid.uuid4().hex}.partial" for part in ("tokens", "documents", "json")}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        info = _write_tokens(file, tokenizer, ends, partial["tokens"], partial["documents"], quiet)
        partial["json"].write_text(json.dumps(info))
        for part, written in partial.items():
            os.replace(written, cache / (f"{digest}.json" if part == "json" else f"{digest}.{part}.npy"))
    except OSError as error:  # of writing, as `records` raises its own
        raise ValueError(
            f"cannot keep the tokens of {file} in cache={cache}: {error.strerror}. Free some space there, or set cache "
            "to another folder; what other files have there stays in use"
        ) from error
    finally:
        for written in partial.values():
            with contextlib.suppress(OSError):
                written.unlink()
    shard = open_shard(file, digest, cache)
    if shard is None:
        raise ValueError(
            f"what was written of {file} to cache={cache} cannot be read back: set cache to another folder"
        )
    return shard


def _write_tokens(
    file: Path, tokenizer: encode.Tokenizer, ends: encode.Edges, tokens: Path, documents: Path, quiet: bool
) -> dict[str, int]:
    """Writes both arrays; returns what HASH.json holds."""
    table, total, largest = array.array("q"), 0, 0
    size = file.stat().st_size
    bar = tqdm.tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        desc=f"tokens of {file.name}",
        delay=2,
        leave=False,
        disable=True if quiet else None,
    )
    with bar, open(tokens, "wb") as out:
        _npy_header(out, 0)
        for record in records.read(file):
            document = encode.document(records.name(file, record.number), record.content, tokenizer, ends)
            out.write(_words(document).tobytes())
            table.extend((total, len(document), bool(document.prefix), record.number))
            total += len(document)
            largest = max(largest, int(document.tokens.max()))
            bar.update(int(size * record.read) - bar.n)
        out.seek(0)
        _npy_header(out, total)
    with open(documents, "wb") as out:
        np.save(out, np.frombuffer(table, np.int64).reshape(-1, _COLUMNS), allow_pickle=False)
    return {"tokens": total, "documents": len(table) // _COLUMNS, "largest": largest}


def _npy_header(out: Any, count: int) -> None:
    """The header of uint32 [count]; numpy leaves room in it for any count."""
    np.lib.format.write_array_header_1_0(out, {"descr": "<u4", "fortran_order": False, "shape": (count,)})


def _words(document: encode.Document) -> np.ndarray:
    """uint32 [n]: ids, plus 2**31 at responses."""
    return document.tokens.astype("<u4") | np.where(document.response, _RESPONSE, np.uint32(0))


def check_tokenizer(vocab_size: int, largest: int) -> None:
    """Raises a ValueError where the largest token id of the data is none of the model's."""
    if largest >= vocab_size:
        raise ValueError(
            f"the texts have token {largest}, and the model's vocab_size={vocab_size} ends at {vocab_size - 1}: "
            "the tokenizer is another model's; use the one that belongs to the weights"
        )
