"""Vectors of texts with torch: the states of a model that reads, pooled and brought to unit length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headrace.device.arrays import as_tensor
from headrace.device.checkpoint import Checkpoint
from headrace.device.encoder import BertConfig
from headrace.device.reference.bert import Bert
from headrace.device.reference.reader import Reader
from headrace.device.weights import Weights

States = Callable[[Tensor, Tensor], Tensor]
"""ids [B, T] and mask [B, T], true for tokens and false for the padding after them -> states [B, T, hidden]"""


def read_with(checkpoint: Checkpoint, pooling: str, device: str) -> TorchVectors:
    """Raises BadModelFile, as the other."""
    _settle()
    return TorchVectors(Reader(checkpoint, torch.device(device)), pooling, torch.device(device))


def bert_with(config: BertConfig, weights: Weights, pooling: str, device: str) -> TorchVectors:
    _settle()
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in weights.names() else ""
    model = Bert(config, lambda stored: as_tensor(weights.array(prefix + stored)), torch.device(device))
    return TorchVectors(model, pooling, torch.device(device))


def _settle() -> None:
    """Where native kernels have the cores, a second team of threads would slow theirs."""
    if "headrace.device.reference.forward" not in sys.modules:
        torch.set_num_threads(1)


class TorchVectors:
    """`pooling` is "mean", "first" or "last"."""

    def __init__(self, model: States, pooling: str, device: torch.device) -> None:
        self.model = model
        self._pooling = pooling
        self._device = device

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
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
