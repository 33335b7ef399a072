"""Files to records: .txt, .jsonl, .parquet and .arrayrecord, each record a text or a conversation, or one clear error.

A .txt file, or one of another suffix that is named itself, is one record. A line of a .jsonl file, the bytes of a
record of an .arrayrecord file and a row of a .parquet file are {"text": ...} or {"messages": [{"role": ..., "content":
...}, ...]}; messages win where both are there. An empty record is an error, not skipped. Records are numbered from 1,
by line in a .jsonl file.
"""

import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from allmem_jax import stores

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrayrecord")
_KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_LFS = b"version https://git-lfs.github.com/spec/"
_BATCH = 64  # rows of a .parquet file in memory at a time


class Record(NamedTuple):
    """One record.

    Attributes:
      number: from 1; 0 where the file is the record.
      content: a text, or messages; neither is checked for being a conversation.
      read: share of the file read so far.
    """

    number: int
    content: str | list[Any]
    read: float


def name(file: str | os.PathLike[str], number: int) -> str:
    """A record in an error: FILE:NUMBER, or FILE where the file is the record."""
    return f"{file}:{number}" if number else str(file)


def find(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files, and those with a known suffix in the folders, in a fixed order; local copies of those at URLs.

    Raises:
      ValueError: nothing found, an empty file, or a Git LFS pointer.
    """
    files: list[Path] = []
    for path in map(stores.local, paths):
        if not path.exists():
            raise ValueError(f"no text at {path}: give {_KINDS} files, or folders of them")
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"no {_KINDS} file in {path}")
        files += found
    for file in files:
        _check(file)
    return files


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


def read(file: Path, field: str = "text") -> Iterator[Record]:
    """The records of a file, one at a time; `field` is what a text is called in them.

    Raises:
      ValueError: a record or the file is damaged, empty or of another kind; it names file and record.
    """
    readers = {".jsonl": _lines, ".parquet": _parquet, ".arrayrecord": _array_record}
    empty = True
    try:
        for record in readers.get(file.suffix, _text)(file, field):
            empty = False
            yield record
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if empty:
        raise ValueError(f"{file} is empty: it has no record; remove it or write it again")


def _text(file: Path, field: str) -> Iterator[Record]:
    text = _decode(str(file), file.read_bytes())
    if not text.strip():
        raise ValueError(f"{file} is empty: it has nothing but white space; remove it or write it again")
    yield Record(0, text, 1.0)


def _lines(file: Path, field: str) -> Iterator[Record]:
    size, done = file.stat().st_size, 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            done += len(line)
            if line.strip():
                yield Record(number, _json(name(file, number), line, field), done / size)


def _parquet(file: Path, field: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
            present = table.schema_arrow.names
            columns = [column for column in (field, "messages") if column in present]
            if not columns:
                raise ValueError(f'{file} has neither a column "{field}" nor "messages"; it has {", ".join(present)}')
            total = table.metadata.num_rows
            for batch in table.iter_batches(_BATCH, columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    values = {column: _arrow_value(name(file, number), batch[column][row]) for column in columns}
                    yield Record(number, _content(name(file, number), values, field), number / total)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name(file, number + 1)} cannot be read as .parquet; copy the file again: {error}") from None


def _arrow_value(where: str, value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _array_record(file: Path, field: str) -> Iterator[Record]:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(file))  # closing one that met damage raises, so none is closed
    if not reader.ok():
        raise ValueError(f"{file} is no whole .arrayrecord file: write or copy it again")
    total = reader.num_records()
    for number in range(1, total + 1):
        try:
            line = reader.read()
        except RuntimeError as error:
            raise ValueError(f"{name(file, number)} is damaged; write or copy the file again: {error}") from None
        yield Record(number, _json(name(file, number), line, field), number / total)


def _decode(where: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _json(where: str, line: bytes, field: str) -> str | list[Any]:
    try:
        record = json.loads(_decode(where, line))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is not JSON that a text can be in: it is nested too deeply") from None
    return _content(where, record, field)


def _content(where: str, record: Any, field: str) -> str | list[Any]:
    """The messages or the text of a record."""
    found = record if isinstance(record, dict) else {}
    messages, text = found.get("messages"), found.get(field)
    if isinstance(messages, list):
        return messages
    if isinstance(text, str) and text.strip():
        return text
    raise ValueError(
        f'{where} has neither a non-empty "{field}" nor a list of "messages"; mend or remove {reprlib.repr(record)}'
    )
