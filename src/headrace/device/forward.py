"""Rows through the layers with torch: the readable reference, the oracle of faster ways, and what runs everywhere.

Owns nothing that changes but the KV memory it is given. Pads the rows of a step to a count that every kernel computes
exactly; who is in a step, and what becomes of the rows, is the executor's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headrace.core.shape import ModelShape
from headrace.device.attention import Rows, kernel_for
from headrace.device.kvstore import KVStore
from headrace.device.linear import Linears
from headrace.device.llama import Llama
from headrace.device.sampler import Row, draw


class TorchForward:
    """A `Forward` of one model on one device."""

    def __init__(self, model: Llama, linears: Linears, store: KVStore) -> None:
        self.model = model
        self.linears = linears
        self.store = store
        self._kernel = kernel_for(model.config.shape, model.config.attention_scale, store, linears.device)

    @property
    def shape(self) -> ModelShape:
        return self.model.config.shape

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return self.linears.rows

    def layers(self, spans: Sequence[Rows], first: int, last: int, ids: Sequence[int], x: Tensor | None) -> Tensor:
        count = sum(span.count for span in spans)
        padded = self.linears.padded(count)
        positions = np.zeros(padded, dtype=np.int64)
        for span in spans:
            positions[span.first_row : span.first_row + span.count] = range(span.start, span.start + span.count)
        if x is None:
            x = self.model.embed(self._on_device(np.array([*ids, *[0] * (padded - count)], dtype=np.int64)))
        else:
            x = functional.pad(x, (0, 0, 0, padded - count))
        attend = self._kernel.prepare(spans, padded)
        return self.model.layers(x, first, last, self._on_device(positions), attend)

    def logits(self, hidden: Tensor, rows: np.ndarray) -> Tensor:
        padded = np.zeros(self.linears.padded(len(rows)), dtype=np.int64)
        padded[: len(rows)] = rows
        return self.model.logits(hidden.index_select(0, self._on_device(padded)))[: len(rows)]

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        return draw(logits, rows)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.linears.device)
