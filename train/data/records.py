"""Files to records: .txt, .jsonl, .json, .parquet and .arrayrecord, in any case; the first three also as .gz.

A .txt file, or one of another suffix that is named itself, is one record, its text as it is written, CRLF included. A
line of a .jsonl file, an element of the array that a .json file holds (or a line of one without an array), the bytes of
a record of an .arrayrecord file and a row of a .parquet file are records as `formats` has them. An empty record is an
error, not skipped. Records are numbered from 1, by line where there are lines. Files are UTF-8; a byte-order mark is
never part of a text.

In a folder, what begins with "." is left out, and so is a .json file that begins with an object which is no record.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from allmem_jax.storage import stores
from train.data import formats

_PLAIN = (".txt", ".jsonl", ".json")
SUFFIXES = (*_PLAIN, ".parquet", ".arrayrecord")
_KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_BOM, _LFS = b"\xef\xbb\xbf", b"version https://git-lfs.github.com/spec/"
_BATCH = 64  # rows of a .parquet file in memory at a time
_UNREADABLE = (OSError, EOFError, zlib.error)  # of opening and unpacking

Parse = Callable[[str, Any], Any]  # a record's name and JSON value to its content


class Record(NamedTuple):
    """One record.

    Attributes:
      number: from 1; 0 where the file is the record.
      content: a text, or what is made of a value: with `formats.document`, a text, a completion or a conversation.
      read: share of the file read so far.
    """

    number: int
    content: Any
    read: float


def name(file: str | os.PathLike[str], number: int) -> str:
    """A record in an error: FILE:NUMBER, or FILE where the file is the record."""
    return f"{file}:{number}" if number else str(file)


def kind(file: Path) -> str:
    """A file's suffix in lower case, with that before it where it is .gz."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() + suffix if suffix == ".gz" else suffix


def find(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files, and those with a known suffix in the folders, in a fixed order; local copies of those at URLs.

    Raises:
      ValueError: nothing found, an empty file, or a Git LFS pointer.
    """
    files: list[Path] = []
    for path in map(stores.local, paths):
        if not path.exists():
            raise ValueError(f"no text at {path}: give {_KINDS} files, or folders of them")
        found = [file for file in sorted(path.rglob("*")) if _belongs(file, path)] if path.is_dir() else [path]
        if not found:
            raise ValueError(f"no {_KINDS} file in {path}")
        files += found
    for file in files:
        _check(file)
    return files


def _belongs(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is one of records."""
    if any(part.startswith(".") for part in file.relative_to(folder).parts) or not file.is_file():
        return False
    known = kind(file) in (*SUFFIXES, *(f"{suffix}.gz" for suffix in _PLAIN))
    return known and not (kind(file) in (".json", ".json.gz") and _is_settings(file))


def _is_settings(file: Path) -> bool:
    """Whether a .json file begins with an object that is no record, or one that goes over several lines."""
    line = _start(file, -1).strip()
    try:
        return line == b"{" or not set(formats.KINDS) & set(
            json.loads(line) if line.startswith(b"{") else formats.KINDS
        )
    except (ValueError, RecursionError):
        return False  # reading it says what is wrong


def _start(file: Path, size: int) -> bytes:
    """The first line of a file's text, or `size` bytes of it, without white space before it."""
    try:
        with _open(file) as (_, unpacked):
            lines = (line for line in iter(lambda: unpacked.readline(size), b"") if line.removeprefix(_BOM).strip())
            return next(lines, b"").removeprefix(_BOM).lstrip()
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


@contextlib.contextmanager
def _open(file: Path) -> Iterator[tuple[Any, Any]]:
    """A file as it lies on disk, and its bytes unpacked."""
    with open(file, "rb") as packed:
        yield packed, gzip.GzipFile(fileobj=packed) if kind(file).endswith(".gz") else packed


def _check(file: Path) -> None:
    """Raises a ValueError where the first bytes tell that a file cannot hold records."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(_LFS))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not start:
        raise ValueError(f"{file} is empty: remove it or write it again")
    if start == _LFS:
        raise ValueError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` where it is from")


def read(file: Path, parse: Parse = formats.document) -> Iterator[Record]:
    """The records of a file, one at a time; `parse` makes a record's content of its value.

    Raises:
      ValueError: a record or the file is damaged, empty or of another kind; it names file and record.
    """
    readers = {".jsonl": _lines, ".json": _array, ".parquet": _parquet, ".arrayrecord": _array_record}
    empty = True
    try:
        for record in readers.get(kind(file).removesuffix(".gz"), _text)(file, parse):
            empty = False
            yield record
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if empty:
        raise ValueError(f"{file} is empty: it has no record; remove it or write it again")


def _text(file: Path, parse: Parse) -> Iterator[Record]:
    with _open(file) as (_, unpacked):
        text = _decode(str(file), unpacked.read())
    if not text.strip():
        raise ValueError(f"{file} is empty: it has nothing but white space; remove it or write it again")
    if "\0" in text:
        raise ValueError(f"{file} is not UTF-8 text: it has zero bytes, as UTF-16 and binary files have")
    yield Record(0, text, 1.0)


def _lines(file: Path, parse: Parse) -> Iterator[Record]:
    size = file.stat().st_size
    with _open(file) as (packed, unpacked):
        for number, line in enumerate(unpacked, 1):
            if line.strip():
                where = name(file, number)
                yield Record(number, parse(where, _json(where, line)), packed.tell() / size)


def _array(file: Path, parse: Parse) -> Iterator[Record]:
    if not _start(file, 64).startswith(b"["):
        yield from _lines(file, parse)
        return
    with _open(file) as (_, unpacked):
        values = _json(str(file), unpacked.read())
    for number, value in enumerate(values, 1):
        yield Record(number, parse(name(file, number), value), number / len(values))


def _parquet(file: Path, parse: Parse) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
            present = table.schema_arrow.names
            if not set(formats.KINDS) & set(present):
                raise ValueError(f"{file} has no column of {', '.join(formats.KINDS)}; it has {', '.join(present)}")
            columns = [column for column in formats.FIELDS if column in present]
            total = table.metadata.num_rows
            for batch in table.iter_batches(_BATCH, columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    where = name(file, number)
                    values = {column: _arrow_value(where, batch[column][row]) for column in columns}
                    yield Record(number, parse(where, values), number / total)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name(file, number + 1)} cannot be read as .parquet; copy the file again: {error}") from None


def _arrow_value(where: str, value: Any) -> Any:
    try:
        return _without_nulls(value.as_py())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _without_nulls(value: Any) -> Any:
    """A value without the fields that a row has only because another has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return [_without_nulls(element) for element in value] if isinstance(value, list) else value


def _array_record(file: Path, parse: Parse) -> Iterator[Record]:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(file))  # closing one that met damage raises, so none is closed
    if not reader.ok():
        raise ValueError(f"{file} is no whole .arrayrecord file: write or copy it again")
    total = reader.num_records()
    for number in range(1, total + 1):
        where = name(file, number)
        try:
            line = reader.read()
        except RuntimeError as error:
            raise ValueError(f"{where} is damaged; write or copy the file again: {error}") from None
        yield Record(number, parse(where, _json(where, line)), number / total)


def _decode(where: str, content: bytes) -> str:
    try:
        return content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _json(where: str, line: bytes) -> Any:
    text = _decode(where, line)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is not JSON that a text can be in: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
