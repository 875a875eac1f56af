"""Texts to vectors: what an embedding model is, and when it is loaded: its weights, and torch, when somebody asks.

texts' tokens -> [ BERT, or a decoder that reads ] -> states of all tokens -> mean, first or last -> unit length

The folder says how the states of a text's tokens become one vector: the mean where nothing says. Batches come one at a
time and run on the thread that all tensor work of the process belongs to.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from headrace.core.ports import Encoding
from headrace.device.architecture import LlamaConfig
from headrace.device.checkpoint import open_checkpoint
from headrace.device.modelfile import BadModelFile, parse_object, read_object, read_text
from headrace.device.weights import Weights, open_weights

MOST_TOKENS = 8192  # of one text that a decoder reads: its attention is computed whole
_MAX_SMALL_BYTES = 1 << 20  # of the small files around the weights
_MOST = 1 << 20  # of anything that a config counts
_FLOAT_BYTES = 4

Vectors = Callable[[Sequence[Sequence[int]]], list[bytes]]  # token ids of some texts -> float32, little-endian, of each

_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The numbers of a BERT encoder."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    positions: int
    norm_eps: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> BertConfig:
        """From config.json. Raises BadModelFile for what is missing, absurd or another architecture."""
        kind, act = config.get("model_type"), config.get("hidden_act", "gelu")
        places = config.get("position_embedding_type", "absolute")
        if (kind, act, places) != ("bert", "gelu", "absolute"):
            raise BadModelFile(
                f"an embedding model must be a BERT with absolute positions and gelu, not {kind!r:.40}, {act!r:.40}, "
                f"{places!r:.40}"
            )
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        counts = [_count(config, name) for name in (*names, "max_position_embeddings")]
        if counts[1] % counts[3]:
            raise BadModelFile(f"{counts[3]} attention heads do not divide a hidden size of {counts[1]}")
        eps = config.get("layer_norm_eps", 1e-12)
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise BadModelFile(f"layer_norm_eps is {eps!r:.40}, which is no small number")
        vocab, hidden, layers, heads, ffn, positions = counts
        return cls(vocab, hidden, layers, heads, ffn, positions, eps)


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value <= _MOST:
        raise BadModelFile(f"{name} is {value!r:.40}; an embedding model needs a count from 1 to {_MOST}")
    return value


class Encoder:
    """An embedding model. It is loaded when it is first asked, by a thread that has time for it."""

    def __init__(self, encoding: Encoding, nbytes: int, load: Callable[[], Vectors]) -> None:
        """`nbytes` is what the weights will take."""
        self.encoding = encoding
        self.nbytes = nbytes
        self._load = load
        self._vectors: Vectors | None = None
        self._loading = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def on(self, thread: ThreadPoolExecutor) -> Encoder:
        """Compute on this thread, which has one worker."""
        self._thread = thread
        return self

    @property
    def loaded(self) -> bool:
        return self._vectors is not None

    async def encode(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        if not self.loaded:
            await asyncio.to_thread(self.load)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.step, sequences)

    def load(self) -> Vectors:
        """Seconds, once. Raises BadModelFile for weights that do not fit the config."""
        with self._loading:
            if self._vectors is None:
                self._vectors = self._load()
            return self._vectors

    def step(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """One vector of float32, little-endian, per sequence of token ids; blocking."""
        return self.load()(sequences)


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an embedding model that can do nothing else: a BERT in sentence-transformers' form."""
    return _says_how(folder) and read_object(folder / "config.json").get("model_type") == "bert"


def open_encoder(path: Path, name: str, device: str = "cpu") -> tuple[Encoder, str]:
    """A sentence-transformers folder with a BERT or a decoder, or any decoder; and its tokenizer.json. Reads no
    weights. Raises BadModelFile."""
    if is_encoder(path):
        return _open_bert(path, name, device)
    checkpoint = open_checkpoint(path)
    config = reads(checkpoint.config)
    pooling = _pooling(path) if _says_how(path) else "mean"

    def load() -> Vectors:
        from headrace.device.reference.vectors import read_with

        return read_with(checkpoint, pooling, device)

    shape = config.shape
    most = min(shape.max_context_tokens, MOST_TOKENS)
    encoding = Encoding(name, shape.hidden, min(_stated(path) or most, most), shape.vocab, config.model_type)
    nbytes = _FLOAT_BYTES * sum(prod(checkpoint.tensors.shape(stored)) for stored in checkpoint.names())
    return Encoder(encoding, nbytes, load), checkpoint.tokenizer_json


def reads(config: dict[str, Any]) -> LlamaConfig:
    """A decoder that only reads. Which class of transformers made the file says whether there is a head, and none is
    needed. Raises BadModelFile."""
    return LlamaConfig.from_hf({**config, "architectures": None})


def _open_bert(folder: Path, name: str, device: str) -> tuple[Encoder, str]:
    config = BertConfig.from_hf(read_object(folder / "config.json"))
    weights, pooling = open_weights(folder), _pooling(folder)

    def load() -> Vectors:
        from headrace.device.reference.vectors import bert_with

        return bert_with(config, weights, pooling, device)

    encoding = Encoding(
        name, config.hidden, min(_stated(folder) or config.positions, config.positions), config.vocab, "bert"
    )
    nbytes = _FLOAT_BYTES * sum(prod(weights.shape(stored)) for stored in weights.names())
    return Encoder(encoding, nbytes, load), read_text(folder / "tokenizer.json")


def open_encoder_tensors(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Config and tensors of a BERT alone, for listing a model. Raises BadModelFile."""
    config = read_object(folder / "config.json")
    BertConfig.from_hf(config)
    return config, open_weights(folder)


def _says_how(path: Path) -> bool:
    return path.is_dir() and (path / "modules.json").is_file()


def _stated(path: Path) -> int | None:
    """Most tokens of one text, if the folder says for how many the model was made."""
    stated = _small(path / "sentence_bert_config.json").get("max_seq_length")
    return stated if type(stated) is int and stated > 2 else None


def _pooling(folder: Path) -> str:
    """Raises BadModelFile for a way of making vectors that is not ours."""
    for module in _modules(folder):
        kind = str(module.get("type") if isinstance(module, dict) else module).rpartition(".")[2]
        if kind not in _MODULES:
            raise BadModelFile(f"{folder} has a module {kind:.60}; supported are {', '.join(_MODULES)}")
    modes = {key for key, value in _small(folder / "1_Pooling" / "config.json").items() if value is True}
    modes = {mode for mode in modes if mode.startswith("pooling_mode_")} or {"pooling_mode_mean_tokens"}
    if len(modes) == 1 and modes <= _POOLINGS.keys():
        return _POOLINGS[modes.pop()]
    pooled = ", ".join(sorted(modes))
    raise BadModelFile(f"{folder} pools by {pooled}; supported are one of the mean, the first and the last token")


def _modules(folder: Path) -> list[Any]:
    path = folder / "modules.json"
    modules = parse_object(f'{{"modules": {read_text(path, _MAX_SMALL_BYTES)}}}', str(path))["modules"]
    if not isinstance(modules, list):
        raise BadModelFile(f"{path} should hold a list of modules")
    return modules


def _small(path: Path) -> dict[str, Any]:
    return parse_object(read_text(path, _MAX_SMALL_BYTES), str(path)) if path.is_file() else {}
