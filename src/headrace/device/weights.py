"""Reads the tensors of a Hugging Face folder: one safetensors file or a sharded set, one tensor at a time.

    length: u64 | JSON header: name -> dtype, shape, [begin, end) | tensor bytes

The header is checked against the file before any tensor is looked at. Pickled weights are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from headrace.device.arrays import BF16
from headrace.device.modelfile import BadModelFile, decode, parse_object, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format itself
MAX_TENSORS = 1 << 17
MAX_DIMS = 8
_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BF16, "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a checked header."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


@dataclass(frozen=True, slots=True)
class Weights:
    """Where every tensor of a folder lies. Opening it has checked all headers."""

    files: Mapping[str, Path]  # tensor name -> file
    stored: Mapping[str, StoredTensor]
    file_bytes: int

    def names(self) -> tuple[str, ...]:
        return tuple(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def array(self, name: str) -> np.ndarray:
        """One tensor as it is stored, private memory over the file. Raises BadModelFile."""
        path = self.files.get(name)
        if path is None:
            raise BadModelFile(f"the model has no tensor {name!r}; its files do not fit its config.json")
        stored = self.stored[name]
        if not prod(stored.shape):
            return np.empty(stored.shape, _DTYPES[stored.dtype])
        try:
            found = np.memmap(path, _DTYPES[stored.dtype], "c", stored.offset, stored.shape)
        except (OSError, ValueError) as error:
            raise BadModelFile(f"cannot read {name!r} from {path}: {error}") from error
        return np.require(found, requirements="A").view(np.ndarray)

    def release(self) -> None:
        """Every array maps its own part of a file, and lets go of it by itself."""


def open_weights(folder: Path) -> Weights:
    """Find and check the safetensors files of a folder. Raises BadModelFile if there are none or one is wrong."""
    if (folder / INDEX).is_file():
        return _open_sharded(folder)
    if (folder / SINGLE).is_file():
        return _open_files([folder / SINGLE])
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if others:
        raise BadModelFile(
            f"{folder} holds only pickled weights ({others[0]}), which can run code; convert them to safetensors"
        )
    raise BadModelFile(f"{folder} holds neither {SINGLE} nor {INDEX}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The entries of one safetensors file, all offsets checked: in order, without gaps, ending with the file."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise BadModelFile(f"{path} declares a header of {header_bytes} bytes in a file of {file_bytes}")
            text = decode(file.read(header_bytes), f"the header of {path}")
    except OSError as error:
        raise BadModelFile(f"cannot read {path}: {error.strerror}") from error
    entries = parse_object(text, f"the header of {path}")
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise BadModelFile(f"{path} declares {len(entries)} tensors, more than any model has")
    start = 8 + header_bytes
    ranges = {name: _check_entry(name, entry, start, path) for name, entry in entries.items()}
    _check_cover(sorted(span for _, span in ranges.values()), file_bytes - start, path)
    return {name: stored for name, (stored, _) in ranges.items()}


def _open_sharded(folder: Path) -> Weights:
    """The index names a file per tensor; every name must be a plain file name, and the file must hold the tensor."""
    placed = read_object(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise BadModelFile(f"{folder / INDEX} has no weight_map from tensor names to file names")
    shards = sorted(set(placed.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise BadModelFile(f"{folder / INDEX} names {shard!r:.80}, which is not a safetensors file of its folder")
        if not (folder / shard).is_file():
            raise BadModelFile(f"{folder / shard} is missing; the index names it")
    weights = _open_files([folder / shard for shard in shards])
    for name, shard in placed.items():
        if weights.files.get(name) != folder / shard:
            raise BadModelFile(f"{folder / INDEX} places {name!r:.80} in {shard}, which does not hold it")
    return weights


def _open_files(paths: list[Path]) -> Weights:
    files: dict[str, Path] = {}
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        header = read_header(path)
        if twice := header.keys() & files.keys():
            raise BadModelFile(f"{path} holds {min(twice)!r:.80} a second time")
        files.update(dict.fromkeys(header, path))
        stored.update(header)
    return Weights(files, stored, sum(path.stat().st_size for path in paths))


def _check_entry(name: str, entry: Any, start: int, path: Path) -> tuple[StoredTensor, tuple[int, int]]:
    what = f"{path}: tensor {name!r:.80}"
    if not isinstance(entry, dict):
        raise BadModelFile(f"{what} has no description")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise BadModelFile(f"{what} has the dtype {dtype!r:.40}; supported are {', '.join(_DTYPES)}")
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        raise BadModelFile(f"{what} has the shape {json.dumps(shape):.80}")
    if not _is_counts(span) or len(span) != 2:
        raise BadModelFile(f"{what} has the offsets {json.dumps(span):.80}")
    nbytes = prod(shape) * _DTYPES[dtype].itemsize
    if span[1] - span[0] != nbytes:
        raise BadModelFile(f"{what} takes {nbytes} bytes and its offsets span {span[1] - span[0]}")
    return StoredTensor(dtype, tuple(shape), start + span[0]), (span[0], span[1])


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    """A list of plain non-negative integers that 64 bits can hold."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_cover(spans: list[tuple[int, int]], data_bytes: int, path: Path) -> None:
    ends = [(0, 0), *spans, (data_bytes, data_bytes)]
    for before, after in pairwise(ends):
        if before[1] != after[0]:
            raise BadModelFile(
                f"{path} has overlapping tensors, a gap or a wrong length at byte {before[1]} of its data; "
                "the download may be incomplete"
            )
