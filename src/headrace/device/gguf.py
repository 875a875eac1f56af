"""A bounded reader of GGUF files, version 2 and 3, little endian.

    magic | version | tensors | pairs | key, type, value ... | name, dims, type, offset ... | padding | tensor data

The file is mapped, not read. Every count, length and offset it declares is compared with the file's size and with a
limit before it is used, so a lying file costs a sentence, not memory. It decides nothing about models: names and
metadata come out as they are stored; `checkpoint` gives them meaning.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from headrace.device.dequant import FORMATS, OTHER_FORMATS, BlockFormat, dequantize
from headrace.device.modelfile import BadModelFile, decode

MAX_HEADER_BYTES = 256 << 20  # everything before the tensor data; a vocabulary of 262,144 tokens takes 6 MiB
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ELEMENTS = 1 << 23  # of all arrays of a file together
MAX_NESTING = 4
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16

_MAP_NORESERVE = 0x4000  # of Linux; the mmap module does not name it before Python 3.13
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Mapping[int, np.dtype] = {  # type number in the file -> element
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

Value = int | float | bool | str | tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is. `shape` is outermost first, the reverse of the order in the file."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open, fully checked GGUF file."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    file_bytes: int
    _data: mmap.mmap = field(repr=False)

    def raw(self, name: str) -> tuple[BlockFormat, np.ndarray]:
        """The stored blocks: format and uint8 [..., bytes per row], a view of the mapped file."""
        info = self._info(name)
        data = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        return info.format, data.reshape(*info.shape[:-1], -1)

    def load(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantised into memory of its own."""
        block, data = self.raw(name)
        return dequantize(data.reshape(-1), block).reshape(self._info(name).shape)

    def release(self) -> None:
        """Give the file's pages back to the system, which reads them again for whoever looks again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise BadModelFile(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]


def open_gguf(path: Path) -> GGUFFile:
    """Map a file and check all of its header. Raises BadModelFile."""
    data = _map(path)
    cursor = _Cursor(data, path)
    tensor_count, pair_count = _read_preamble(cursor)
    metadata = _read_metadata(cursor, pair_count)
    tensors = _read_tensors(cursor, tensor_count, _alignment(metadata, path))
    return GGUFFile(path, MappingProxyType(metadata), MappingProxyType(tensors), len(data), data)


def _map(path: Path) -> mmap.mmap:
    """The file as private memory: copy on write, so that tensors over it are writable yet never change the file."""
    try:
        if not path.is_file():
            raise BadModelFile(f"{path} is missing or not a regular file")
        with path.open("rb") as file:
            if sys.platform == "linux":  # not reserved, so that a file may be larger than the memory
                return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError as error:  # an empty file cannot be mapped
        raise BadModelFile(f"{path} is empty") from error
    except OSError as error:
        raise BadModelFile(f"cannot read {path}: {error.strerror}") from error


class _Cursor:
    """Reads forward through the header and refuses to leave it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.path = path
        self.position = 0
        self.elements_left = MAX_ARRAY_ELEMENTS
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.file_bytes = len(data)
        self._data = data

    def bad(self, what: str) -> BadModelFile:
        return BadModelFile(f"{self.path} is not a GGUF file Headrace can read: {what}")

    def skip(self, nbytes: int, what: str) -> int:
        """Advance; the position before it."""
        start = self.position
        if nbytes > self.end - start:
            where = "the file ends" if self.end == self.file_bytes else "the header exceeds its limit"
            raise self.bad(f"{where} inside {what} at byte {start}")
        self.position = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._data, self.skip(8, what))[0])

    def string(self, what: str, limit_bytes: int = MAX_STRING_BYTES) -> str:
        nbytes = self.u64(what)
        if nbytes > limit_bytes:
            raise self.bad(f"{what} is {nbytes} bytes long, more than {limit_bytes}")
        start = self.skip(nbytes, what)
        return decode(self._data[start : start + nbytes], f"{self.path}: {what}")

    def numbers(self, kind: int, count: int, what: str) -> list[int | float | bool]:
        """`count` numbers of one type, already checked against a limit by the caller."""
        dtype = _NUMBERS[kind]
        start = self.skip(count * dtype.itemsize, what)
        values = np.frombuffer(self._data, dtype, count, start)
        if kind != _BOOL:
            return values.tolist()
        if count and values.max() > 1:
            raise self.bad(f"{what} holds a boolean that is neither 0 nor 1")
        return values.astype(bool).tolist()

    def value(self, kind: int, what: str, depth: int = 0) -> Value:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what, depth + 1)
        if kind not in _NUMBERS:
            raise self.bad(f"{what} has the unknown type {kind}")
        return self.numbers(kind, 1, what)[0]

    def _array(self, what: str, depth: int) -> tuple[Any, ...]:
        kind, count = self.u32(what), self.u64(what)
        if depth > MAX_NESTING:
            raise self.bad(f"{what} nests arrays more than {MAX_NESTING} deep")
        if count > self.elements_left:
            raise self.bad(f"{what} declares {count} elements; a file may have {MAX_ARRAY_ELEMENTS} in all")
        self.elements_left -= count
        if kind in _NUMBERS:
            return tuple(self.numbers(kind, count, what))
        return tuple([self.value(kind, what, depth) for _ in range(count)])


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Counts of tensors and metadata pairs."""
    if cursor.u32("the magic") != 0x46554747:  # "GGUF"
        raise cursor.bad("it does not start with GGUF")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise cursor.bad("it is big endian; convert it to little endian")
    if version not in (2, 3):
        raise cursor.bad(f"it has version {version}; versions 2 and 3 are supported")
    tensors, pairs = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
        raise cursor.bad(f"it declares {tensors} tensors and {pairs} metadata pairs, more than any model has")
    return tensors, pairs


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.string("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.bad(f"the metadata key {key!r:.80} appears twice")
        metadata[key] = cursor.value(cursor.u32("a metadata type"), f"metadata {key!r:.80}")
    return metadata


def _alignment(metadata: Mapping[str, Value], path: Path) -> int:
    value = metadata.get("general.alignment", 32)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise BadModelFile(f"{path}: general.alignment is {value!r:.40}, not a power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """All tensor entries with absolute offsets: aligned, inside the file, and disjoint."""
    entries = [_read_tensor(cursor, alignment) for _ in range(count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, block, shape, offset in entries:
        nbytes = prod(shape) // block.elements * block.nbytes
        if data_start + offset + nbytes > cursor.file_bytes:
            raise cursor.bad(f"tensor {name!r:.80} reaches past the end of the file; the download may be incomplete")
        if name in tensors:
            raise cursor.bad(f"the tensor {name!r:.80} appears twice")
        tensors[name] = TensorInfo(name, block, shape, data_start + offset, nbytes)
    for before, after in pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
        if before.offset + before.nbytes > after.offset:
            raise cursor.bad(f"tensors {before.name!r:.80} and {after.name!r:.80} overlap")
    return tensors


def _read_tensor(cursor: _Cursor, alignment: int) -> tuple[str, BlockFormat, tuple[int, ...], int]:
    name = cursor.string("a tensor name", MAX_KEY_BYTES)
    what = f"tensor {name!r:.80}"
    dims = cursor.u32(what)
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.bad(f"{what} has {dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = tuple(reversed([cursor.u64(what) for _ in range(dims)]))
    block = _format(cursor, cursor.u32(what), what)
    offset = cursor.u64(what)
    if min(shape) < 1 or shape[-1] % block.elements or prod(shape) // block.elements * block.nbytes > cursor.file_bytes:
        raise cursor.bad(f"{what} of shape {shape} cannot be {block.name} in a file of {cursor.file_bytes} bytes")
    if offset % alignment:
        raise cursor.bad(f"{what} starts at {offset}, which is not aligned to {alignment}")
    return name, block, shape, offset


def _format(cursor: _Cursor, kind: int, what: str) -> BlockFormat:
    if kind in FORMATS:
        return FORMATS[kind]
    supported = ", ".join(block.name for block in FORMATS.values())
    raise cursor.bad(f"{what} has the type {OTHER_FORMATS.get(kind, kind)}; supported types are {supported}")
