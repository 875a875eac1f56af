"""Opens a model, whatever its format, and shows it in one shape: Hugging Face names and config terms.

`open_checkpoint` decides the format and checks the files; a `Checkpoint` then hands out one tensor at a time. What the
config means for the computation, and whether the tensors fit it, is for the model to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from headrace.device import ggufmap
from headrace.device.arrays import as_tensor
from headrace.device.dequant import BlockFormat
from headrace.device.folder import read_config, read_vocabulary
from headrace.device.gguf import GGUFFile, open_gguf
from headrace.device.modelfile import BadModelFile, read_object
from headrace.device.tokenizer import Vocabulary, vocabulary_of
from headrace.device.weights import Weights, open_weights

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "headrace.json"  # beside a pulled model: where it came from


class Tensors(Protocol):
    """Named tensors of one model, under Hugging Face names."""

    @property
    def file_bytes(self) -> int: ...

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def array(self, name: str) -> np.ndarray:
        """As it is stored from safetensors, as float32 from GGUF; uint16 is bfloat16. Raises BadModelFile."""
        ...

    def release(self) -> None:
        """What was read so far is not needed again soon: give back the memory of the file."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model.

    `config` speaks the language of config.json. GGUF files of Gemma store norm weights with the 1 of (1 + w) included,
    which float32 cannot take out again exactly: `config["headrace_norm_includes_one"]` is then true.
    """

    name: str
    config: dict[str, Any]
    tensors: Tensors
    vocabulary: Vocabulary

    def tensor(self, name: str) -> Tensor:
        """An array for torch. Raises BadModelFile."""
        return as_tensor(self.tensors.array(name))

    def names(self) -> tuple[str, ...]:
        return self.tensors.names()

    @property
    def file_bytes(self) -> int:
        return self.tensors.file_bytes

    @property
    def tokenizer_json(self) -> str:
        return self.vocabulary.tokenizer_json

    @property
    def chat_template(self) -> str | None:
        return self.vocabulary.chat_template

    @property
    def bos_token(self) -> str | None:
        return self.vocabulary.bos_token

    @property
    def eos_token(self) -> str | None:
        return self.vocabulary.eos_token

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.vocabulary.eos_token_ids

    @property
    def add_bos(self) -> bool:
        return self.vocabulary.add_bos


def open_checkpoint(path: Path) -> Checkpoint:
    """A Hugging Face folder, a GGUF file, or a folder with one GGUF file. Raises BadModelFile."""
    if path.is_dir():
        alone = gguf_in(path)
        return _open_folder(path) if alone is None else _open_gguf(alone)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise BadModelFile(f"{path} holds pickled weights, which can run code; convert them to safetensors or GGUF")
    if path.suffix == ".safetensors":
        raise BadModelFile(f"{path} is only the weights; give the folder that holds them with config.json")
    return _open_gguf(path)


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that is not a Hugging Face one; None if config.json is there."""
    if (folder / "config.json").exists():
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise BadModelFile(f"{folder} holds {len(found)} GGUF files; name one of them, such as {found[0]}")
    if not found:
        raise BadModelFile(f"{folder} holds neither config.json nor a GGUF file")
    return found[0]


def open_tensors(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors alone, for listing a model without building its vocabulary. Raises BadModelFile."""
    alone = gguf_in(path) if path.is_dir() else path
    if alone is None:
        config, weights = read_config(path), open_weights(path)
        return config, _folder_tensors(weights)
    file = open_gguf(alone)
    meta = ggufmap.Metadata(file)
    return ggufmap.config_of(file, meta), GGUFTensors.of(file, meta)


def _open_folder(folder: Path) -> Checkpoint:
    config, tensors = open_tensors(folder)
    return Checkpoint(_name(folder, folder.resolve().name), config, tensors, read_vocabulary(folder, config))


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)
    meta = ggufmap.Metadata(file)
    config = ggufmap.config_of(file, meta)
    words = vocabulary_of(meta, config["vocab_size"])
    return Checkpoint(_name(path.parent, path.stem), config, GGUFTensors.of(file, meta), words)


def _name(folder: Path, otherwise: str) -> str:
    """A pulled model is called what it was pulled as."""
    if not (folder / RECORD).is_file():
        return otherwise
    source = read_object(folder / RECORD).get("source")
    return source if isinstance(source, str) else otherwise


@dataclass(frozen=True, slots=True)
class GGUFTensors:
    """A GGUF file under Hugging Face names, with q and k rows in the order that rotating halves needs."""

    file: GGUFFile
    stored: Mapping[str, str]  # Hugging Face name -> name in the file
    heads: Mapping[str, int]  # name in the file -> heads whose rows are interleaved

    @classmethod
    def of(cls, file: GGUFFile, meta: ggufmap.Metadata) -> GGUFTensors:
        q_heads = meta.count("{arch}.attention.head_count", most=1 << 12)
        kv_heads = meta.count("{arch}.attention.head_count_kv", q_heads, most=1 << 12)
        stored = ggufmap.tensor_names(file, meta.arch)
        turned = [name for name in stored.values() if ggufmap.has_interleaved_rows(meta.arch, name)]
        return cls(file, stored, {name: q_heads if ".attn_q." in name else kv_heads for name in turned})

    @property
    def file_bytes(self) -> int:
        return self.file.file_bytes

    def names(self) -> tuple[str, ...]:
        return tuple(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._stored(name)].shape

    def array(self, name: str) -> np.ndarray:
        stored = self._stored(name)
        return self._ordered(stored, self.file.load(stored))

    def release(self) -> None:
        self.file.release()

    def raw(self, name: str) -> tuple[BlockFormat, np.ndarray]:
        """The quantised blocks as uint8 [rows, bytes per row], rows in the same order as `array` has them."""
        stored = self._stored(name)
        block, rows = self.file.raw(stored)
        return block, self._ordered(stored, rows)

    def _stored(self, name: str) -> str:
        if name not in self.stored:
            raise BadModelFile(f"{self.file.path} has no tensor for {name}; it does not fit its own metadata")
        return self.stored[name]

    def _ordered(self, stored: str, rows: np.ndarray) -> np.ndarray:
        heads = self.heads.get(stored)
        return rows if heads is None else ggufmap.deinterleave(rows, heads)


def _folder_tensors(weights: Weights) -> Tensors:
    renamed = {_text_name(name): name for name in weights.names()}
    return weights if all(new == old for new, old in renamed.items()) else _Renamed(weights, renamed)


def _text_name(name: str) -> str:
    """A multimodal checkpoint's name of a tensor as the text model alone would call it."""
    for outer, inner in (
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(outer):
            return inner + name.removeprefix(outer)
    return name


@dataclass(frozen=True, slots=True)
class _Renamed:
    """Safetensors whose names differ from the text model's."""

    weights: Weights
    stored: Mapping[str, str]

    @property
    def file_bytes(self) -> int:
        return self.weights.file_bytes

    def names(self) -> tuple[str, ...]:
        return tuple(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(self.stored[name])

    def array(self, name: str) -> np.ndarray:
        return self.weights.array(self.stored.get(name, name))

    def release(self) -> None:
        self.weights.release()
