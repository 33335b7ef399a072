"""Records to documents: tokens of every file, made once and kept as memory-mapped .npy under the file's hash.

In the cache folder a file is three, named by sha256 of its content and of the tokenizer:

    HASH.tokens.npy       uint32 [N], a token's id, plus 2**31 where a loss on responses alone looks at it
    HASH.documents.npy    int64 [D, 4]: first token, number of tokens, 1 where pieces start with the prefix, record
    HASH.json             N, D and the largest id; written last, so what it does not match is made again

    N tokens of a file    D documents of a file    n tokens of a document
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jinja2
import numpy as np
import tqdm

from allmem_jax import stores
from train import records

_FORMAT = 2  # of the cache
_ID, _RESPONSE = np.uint32(2**31 - 1), np.uint32(2**31)
_COLUMNS = 4


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

    def __len__(self) -> int:
        return len(self.tokens)


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

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Document:
        """One document, read whole."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard, row = self._find(index)
        tokens, response = self.take(index, 0, int(self.lengths[index]))
        where = records.name(shard.file, int(shard.table[row, 3]))
        return Document(where, tokens, response, self.prefix if self.prefixed[index] else ())

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


def in_memory(documents: Sequence[Document]) -> Documents:
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
    paths: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, cache: str | os.PathLike[str]
) -> Documents:
    """Every document of the files, or of those in the folders, in a fixed order; see `records` for what is read.

    Args:
      paths: files or folders.
      tokenizer: of the model.
      cache: folder where tokens are kept; files that have none there are tokenised now.

    Raises:
      ValueError: a file or a record that cannot be used, or a cache folder that cannot be written.
    """
    shards, folder = [], stores.local_only(cache, "cache")
    for file, digest in digests(records.find(paths), tokenizer):
        shard = open_shard(file, digest, folder)
        shards.append(tokenise(file, digest, tokenizer, folder) if shard is None else shard)
    return Documents(shards, tuple(tokenizer.encode("")))


def digests(files: Sequence[Path], tokenizer: Tokenizer) -> list[tuple[Path, str]]:
    """Each file with its name in the cache. Files are read in pieces, several at a time."""
    of_tokenizer = tokenizer_hash(tokenizer)

    def digest(file: Path) -> str:
        try:
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        return hashlib.sha256(f"{_FORMAT} {file.suffix} {content} {of_tokenizer}".encode()).hexdigest()

    with futures.ThreadPoolExecutor() as pool:
        hashes = pool.map(digest, files)
        bar = tqdm.tqdm(hashes, desc="hashing files", total=len(files), delay=2, leave=False, disable=None)
        return list(zip(files, bar, strict=True))


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of what decides on tokens: all of a fast tokenizer, else its class and vocabulary; the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = getattr(tokenizer, "get_vocab", dict)() if backend is None else backend.to_str()
    template = getattr(tokenizer, "chat_template", None)
    parts = [type(tokenizer).__name__, vocabulary, template, list(tokenizer.encode(""))]
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


def tokenise(file: Path, digest: str, tokenizer: Tokenizer, cache: Path, *, quiet: bool = False) -> Shard:
    """Makes the tokens of a file and keeps them, record by record; `quiet` shows no progress.

    Raises:
      ValueError: a bad record, or no space: then nothing is left of this file, and other files' tokens stay.
    """
    partial = {part: cache / f"{digest}.{part}.{uuid.uuid4().hex}.partial" for part in ("tokens", "documents", "json")}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        info = _write_tokens(file, tokenizer, partial["tokens"], partial["documents"], quiet)
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


def _write_tokens(file: Path, tokenizer: Tokenizer, tokens: Path, documents: Path, quiet: bool) -> dict[str, int]:
    """Writes both arrays; returns what HASH.json holds."""
    table, total, largest = array.array("q"), 0, 0
    size = file.stat().st_size
    bar = tqdm.tqdm(
        total=size, unit="B", unit_scale=True, desc=f"tokens of {file.name}", delay=2, leave=False,
        disable=True if quiet else None,
    )  # fmt: skip
    with bar, open(tokens, "wb") as out:
        _npy_header(out, 0)
        for record in records.read(file):
            document = _document(records.name(file, record.number), record.content, tokenizer)
            out.write(_words(document).tobytes())
            table.extend((total, len(document), isinstance(record.content, str), record.number))
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


def _words(document: Document) -> np.ndarray:
    """uint32 [n]: ids, plus 2**31 at responses."""
    return document.tokens.astype("<u4") | np.where(document.response, _RESPONSE, np.uint32(0))


def _document(where: str, content: str | list[Any], tokenizer: Tokenizer) -> Document:
    if isinstance(content, str):
        tokens = np.asarray(_encode(where, content, tokenizer), np.int32)
        document = Document(where, tokens, np.ones(tokens.shape, bool))
    else:
        document = chat_document(where, content, tokenizer)
    if not len(document):
        raise ValueError(f"{where} is empty: the tokenizer makes no token of it; remove it")
    return document


def _encode(where: str, text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        text.encode()  # tokenizers do not say what is wrong with half a surrogate pair, which JSON may hold
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair, which is no text: {error}") from None
    return tokenizer.encode(text, add_special_tokens=False)


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
            text = _render(name, messages[:upto], prompt, tokenizer)
            if not text.startswith(done):
                raise ValueError(
                    f"{name}: the chat template renders earlier turns differently once turn {turn + 1} is added; "
                    "split the conversation so that each record ends at one response"
                )
            parts.append((_encode(name, text[len(done) :], tokenizer), not prompt))
            done = text
    tokens = np.asarray([token for ids, _ in parts for token in ids], np.int32)
    response = np.asarray([flag for ids, flag in parts for _ in ids], bool)
    return Document(name, tokens, response)


def _render(name: str, messages: list[dict[str, str]], prompt: bool, tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"{name}: the tokenizer's chat template does not take this conversation: {error}") from None


def check_tokenizer(vocab_size: int, largest: int) -> None:
    """Raises a ValueError where the largest token id of the data is none of the model's."""
    if largest >= vocab_size:
        raise ValueError(
            f"the texts have token {largest}, and the model's vocab_size={vocab_size} ends at {vocab_size - 1}: "
            "the tokenizer is another model's; use the one that belongs to the weights"
        )
