"""An embedding model, ready to use: a sentence-transformers folder as an `Encoder` (`core.ports`).

Decides how the states of a text's tokens become one vector, as the folder says: the mean of all or the first (CLS),
normalised to length 1. Batches come one at a time and run on the thread that all tensor work of the process belongs to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.core.ports import Encoding
from headrace.device.bert import Bert, BertConfig
from headrace.device.modelfile import BadModelFile, parse_object, read_object, read_text
from headrace.device.weights import Weights, open_weights

_MAX_SMALL_BYTES = 1 << 20  # of the small files around the weights


class TorchEncoder:
    """Texts to vectors. `pooling` is "mean" or "cls"."""

    def __init__(self, model: Bert, encoding: Encoding, pooling: str, device: torch.device) -> None:
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
        if self._pooling == "cls":
            return functional.normalize(states[:, 0])
        counted = mask[:, :, None].to(states.dtype)
        return functional.normalize((states * counted).sum(1) / counted.sum(1))


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an embedding model rather than one that writes."""
    return folder.is_dir() and (folder / "modules.json").is_file()


def open_encoder(folder: Path, name: str, device: torch.device | str | None = None) -> tuple[TorchEncoder, str]:
    """The model of a sentence-transformers folder, and its tokenizer.json. Raises BadModelFile."""
    if not is_encoder(folder):
        raise BadModelFile(f"{folder} is no embedding model: it has no modules.json that says how to pool")
    device = torch.device(device or "cpu")
    config = BertConfig.from_hf(read_object(folder / "config.json"))
    weights = open_weights(folder)
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in weights.names() else ""
    model = Bert(config, lambda stored: weights.tensor(prefix + stored), device)
    encoding = Encoding(name, config.hidden, _longest(folder, config), config.vocab)
    return TorchEncoder(model, encoding, _pooling(folder), device), read_text(folder / "tokenizer.json")


def open_encoder_tensors(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Config and tensors alone, for listing a model. Raises BadModelFile."""
    config = read_object(folder / "config.json")
    BertConfig.from_hf(config)
    return config, open_weights(folder)


def _longest(folder: Path, config: BertConfig) -> int:
    """Most tokens of one text: what the model was made for, if the folder says so, else as many positions as it has."""
    stated = _small(folder / "sentence_bert_config.json").get("max_seq_length")
    return min(stated, config.positions) if type(stated) is int and stated > 2 else config.positions


def _pooling(folder: Path) -> str:
    modes = {key for key, value in _small(folder / "1_Pooling" / "config.json").items() if value is True}
    modes &= {f"pooling_mode_{name}" for name in ("mean_tokens", "cls_token", "max_tokens", "mean_sqrt_len_tokens")}
    if modes == {"pooling_mode_cls_token"}:
        return "cls"
    if modes in ({"pooling_mode_mean_tokens"}, set()):
        return "mean"
    raise BadModelFile(f"{folder} pools by {', '.join(sorted(modes))}; supported are the mean and the first token")


def _small(path: Path) -> dict[str, Any]:
    return parse_object(read_text(path, _MAX_SMALL_BYTES), str(path)) if path.is_file() else {}
