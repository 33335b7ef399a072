"""Reads a GGUF file: metadata, and tensors that are dequantised one at a time.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and offset in the header is
held against the file's size before it is used, so that a damaged or hostile header is an error and never a hang.
The quantised blocks themselves are decoded by the `gguf` package.
"""

import math
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class Tensor(NamedTuple):
    """Where one tensor lies in the file.

    Attributes:
      shape: in numpy order, slowest axis first.
      kind: how its blocks are encoded.
      start: offset of its first byte in the file.
      n_bytes: its encoded length.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    n_bytes: int


class GGUFFile(NamedTuple):
    """The header of a GGUF file."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, of its `shape`."""
        tensor = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, tensor.n_bytes, offset=tensor.start)
        # `gguf` decodes 16 rows at a time. Blocks follow each other, so rows may have any length: a quarter million.
        blocks = tensor.n_bytes // gguf.GGML_QUANT_SIZES[tensor.kind][1]
        rows = math.gcd(blocks, 16 << (math.prod(tensor.shape) >> 22).bit_length())
        return gguf.dequantize(data.reshape(rows, -1), tensor.kind).reshape(tensor.shape)


def open_gguf(path: str | pathlib.Path) -> GGUFFile:
    """Reads and checks the header of a GGUF file (versions 2 and 3, little-endian).

    Raises:
      ValueError: the file is truncated, is not GGUF, or its header contradicts its size.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{path} is not a GGUF file: it has {size} bytes, less than a header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        magic, version, n_tensors, n_keys = cursor.unpack("4sIQQ")
        if magic != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}")
        if version not in (2, 3):
            raise ValueError(
                f"{path}: GGUF version {version} is not supported; use a little-endian version 2 or 3 file"
            )
        cursor.bound("metadata keys", n_keys, 13)
        metadata = {cursor.string(): cursor.value() for _ in range(n_keys)}
        cursor.bound("tensors", n_tensors, 32)
        entries = [_tensor_entry(cursor) for _ in range(n_tensors)]
        tensors = _place_tensors(path, entries, cursor.position, metadata.get("general.alignment", 32), size)
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """Reads values in order, never past the end."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def bound(self, what: str, count: int, least_bytes: int) -> None:
        """ValueError when `count` things of at least `least_bytes` each cannot lie in the rest of the file."""
        left = len(self.data) - self.position
        if count * least_bytes > left:
            raise ValueError(
                f"{self.path}: truncated or damaged GGUF: the header claims {count} {what} at byte {self.position}, "
                f"but only {left} bytes follow; fetch the file again"
            )

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Values of a little-endian `struct` format."""
        self.bound("bytes", struct.calcsize("<" + form), 1)
        values = struct.unpack_from("<" + form, self.data, self.position)
        self.position += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        """A string with its length before it."""
        (length,) = self.unpack("Q")
        self.bound("bytes of text", length, 1)
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8", errors="replace")

    def value(self) -> Any:
        """A metadata value with its type before it; arrays of numbers become numpy arrays."""
        (kind,) = self.unpack("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: damaged GGUF: unknown value type {kind} at byte {self.position - 4}")
        item, count = self.unpack("IQ")
        if item == _STRING:
            self.bound("strings", count, 8)
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise ValueError(f"{self.path}: GGUF array of type {item} at byte {self.position - 12} is not supported")
        dtype = np.dtype("<" + _SCALARS[item]) if item != 7 else np.dtype(bool)
        self.bound("array elements", count, dtype.itemsize)
        self.position += count * dtype.itemsize
        return np.frombuffer(self.data[self.position - count * dtype.itemsize : self.position], dtype)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    (n_dims,) = cursor.unpack("I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise ValueError(f"{cursor.path}: damaged GGUF: tensor {name!r} has {n_dims} dimensions")
    shape = tuple(reversed(cursor.unpack(f"{n_dims}Q")))  # the file puts the fastest axis first
    if not all(shape):
        raise ValueError(f"{cursor.path}: damaged GGUF: tensor {name!r} has the shape {shape}")
    kind, offset = cursor.unpack("IQ")
    return name, shape, kind, offset


def _place_tensors(path, entries, header_end: int, alignment: int, size: int) -> dict[str, Tensor]:
    """Turns the header's entries into byte ranges that lie in the file."""
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: damaged GGUF: general.alignment={alignment!r}")
    start = -(-header_end // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        try:
            quant = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        except (ValueError, KeyError):
            raise ValueError(
                f"{path}: tensor {name!r} has the unknown encoding {kind}; update the gguf package"
            ) from None
        if shape[-1] % block:
            raise ValueError(f"{path}: damaged GGUF: rows of {name!r} ({shape[-1]}) are no multiple of {block}")
        n_bytes = math.prod(shape) // block * block_bytes
        if start + offset + n_bytes > size:
            raise ValueError(
                f"{path}: truncated GGUF: tensor {name!r} ends at byte {start + offset + n_bytes}, "
                f"the file at {size}; fetch the file again"
            )
        if name in tensors:
            raise ValueError(f"{path}: damaged GGUF: tensor {name!r} appears twice")
        tensors[name] = Tensor(shape, quant, start + offset, n_bytes)
    return tensors
