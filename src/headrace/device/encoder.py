"""An embedding model, ready to use: a sentence-transformers folder, or any decoder, as an `Encoder` (`core.ports`).

Decides how the states of a text's tokens become one vector, as the folder says: the mean of all, the first (CLS) or the
last, normalised to length 1; the mean where nothing says. Batches come one at a time and run on the thread that all
tensor work of the process belongs to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headrace.core.ports import Encoding
from headrace.device.bert import Bert, BertConfig
from headrace.device.checkpoint import open_checkpoint
from headrace.device.modelfile import BadModelFile, parse_object, read_object, read_text
from headrace.device.reader import Reader
from headrace.device.weights import Weights, open_weights

_MAX_SMALL_BYTES = 1 << 20  # of the small files around the weights


_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
_MODULES = ("Transformer", "Pooling", "Normalize")


class States(Protocol):
    """A model that reads."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, T] and mask [B, T], true for tokens and false for the padding after them -> states [B, T, hidden]."""
        ...


class TorchEncoder:
    """Texts to vectors. `pooling` is "mean", "first" or "last"."""

    def __init__(self, model: States, encoding: Encoding, pooling: str, device: torch.device) -> None:
        self.encoding = encoding
        self.model = model
        self._pooling = pooling
        self._device = device
        self._thread: ThreadPoolExecutor | None = None

    def on(self, thread: ThreadPoolExecutor) -> TorchEncoder:
        """Compute on this thread, which has one worker; see `executor.TorchExecutor`."""
        self._thread = thread
        return self

    async def encode(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.step, sequences)

    @torch.inference_mode()
    def step(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """One vector of float32, little-endian, per sequence of token ids; blocking."""
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = True
        mask = mask.to(self._device)
        states = self.model(ids.to(self._device), mask)
        vectors = self._pooled(states, mask).float().cpu()
        return [vector.numpy().astype("<f4").tobytes() for vector in vectors]

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [B, T, hidden] -> unit vectors [B, hidden]."""
        if self._pooling != "mean":
            last = mask.sum(1) - 1
            return functional.normalize(states[range(len(states)), 0 if self._pooling == "first" else last])
        counted = mask[:, :, None].to(states.dtype)
        return functional.normalize((states * counted).sum(1) / counted.sum(1))


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an embedding model that can do nothing else: a BERT in sentence-transformers' form."""
    return _says_how(folder) and read_object(folder / "config.json").get("model_type") == "bert"


def open_encoder(path: Path, name: str, device: torch.device | str | None = None) -> tuple[TorchEncoder, str]:
    """A sentence-transformers folder with a BERT or a decoder, or any decoder; and its tokenizer.json. Raises
    BadModelFile."""
    device = torch.device(device or "cpu")
    if is_encoder(path):
        return _open_bert(path, name, device)
    checkpoint = open_checkpoint(path)
    model = Reader(checkpoint, device)
    shape = model.config.shape
    longest = min(_stated(path) or model.max_tokens, model.max_tokens)
    encoding = Encoding(name, shape.hidden, longest, shape.vocab, model.config.model_type)
    pooling = _pooling(path) if _says_how(path) else "mean"
    return TorchEncoder(model, encoding, pooling, device), checkpoint.tokenizer_json


def _open_bert(folder: Path, name: str, device: torch.device) -> tuple[TorchEncoder, str]:
    config = BertConfig.from_hf(read_object(folder / "config.json"))
    weights = open_weights(folder)
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in weights.names() else ""
    model = Bert(config, lambda stored: weights.tensor(prefix + stored), device)
    longest = min(_stated(folder) or config.positions, config.positions)
    encoding = Encoding(name, config.hidden, longest, config.vocab, "bert")
    return TorchEncoder(model, encoding, _pooling(folder), device), read_text(folder / "tokenizer.json")


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
