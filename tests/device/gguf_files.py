"""Small GGUF files for tests, written with the reference writer of the `gguf` package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
ByName = Mapping[str, np.ndarray]


def write(
    path: Path, tensors: ByName, arch: str = "llama", fill: Callable[[gguf.GGUFWriter], None] | None = None
) -> Path:
    """A file of float32 tensors, with whatever metadata `fill` adds."""
    writer = gguf.GGUFWriter(path, arch)
    if fill:
        fill(writer)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    return _finish(writer, path)


def write_blocks(path: Path, blocks: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """A file of quantised tensors given as (type name, uint8 rows)."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, rows) in blocks.items():
        writer.add_tensor(name, rows, raw_dtype=Kind[kind])
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(path: Path) -> Path:
    """A file that has one of everything: scalars, strings, arrays, nested arrays, plain and quantised tensors."""
    rng = np.random.default_rng(0)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("llama.block_count", 1)
        writer.add_float32("llama.rope.freq_base", 1e4)
        writer.add_bool("a.flag", True)
        writer.add_int64("a.long", -(2**40))
        writer.add_string("general.name", "tïny")
        writer.add_array("a.words", ["one", "two", ""])
        writer.add_array("a.numbers", [1, 2, 3])
        writer.add_array("a.scores", [0.5, -1.0])

    tensors = {"token_embd.weight": rng.standard_normal((4, 32)).astype(np.float32), "b": np.ones(3, np.float32)}
    return write(path, tensors, fill=fill)


def packaged(module: str) -> Path | None:
    """The folder of an installed package, if it is there."""
    spec = importlib.util.find_spec(module)
    return Path(next(iter(spec.submodule_search_locations or []))) if spec else None
