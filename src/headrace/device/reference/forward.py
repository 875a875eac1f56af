"""Rows through the layers with torch: the readable reference, the oracle of faster ways, and what runs everywhere.

Owns nothing that changes but the KV memory it is given. Pads the rows of a step to a count that every kernel computes
exactly; who is in a step, and what becomes of the rows, is the executor's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headrace.core.config import DeviceSettings
from headrace.core.shape import ModelShape
from headrace.core.step import Sampled
from headrace.core.types import TokenLogprob
from headrace.device.architecture import LlamaConfig
from headrace.device.checkpoint import Checkpoint
from headrace.device.forward import Forward, Rows
from headrace.device.hosttier import HostTier
from headrace.device.kvstore import Kept
from headrace.device.load import Behind, Built
from headrace.device.reference.attention import kernel_for
from headrace.device.reference.cudatier import CudaTier
from headrace.device.reference.draws import describe, draw, sample
from headrace.device.reference.linear import Linears
from headrace.device.reference.llama import Llama
from headrace.device.reference.tensorstore import TensorStore
from headrace.device.sampler import Row


class TorchForward:
    """A `Forward` of one model on one device."""

    def __init__(self, model: Llama, linears: Linears, store: TensorStore) -> None:
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

    @torch.inference_mode()
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

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: np.ndarray) -> Tensor:
        padded = np.zeros(self.linears.padded(len(rows)), dtype=np.int64)
        padded[: len(rows)] = rows
        return self.model.logits(hidden.index_select(0, self._on_device(padded)))[: len(rows)]

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        return draw(logits, rows)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([*parts])

    @torch.inference_mode()
    def sample(self, hidden: Tensor, chosen: np.ndarray, rows: Sequence[Row]) -> list[Sampled]:
        return sample(self.logits(hidden, chosen), rows)

    @torch.inference_mode()
    def judged(self, hidden: Tensor, chosen: np.ndarray, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
        logprobs = torch.log_softmax(self.logits(hidden, chosen), -1)
        return [describe(row, token, count) for row, token in zip(logprobs, tokens, strict=True)]

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.linears.device)


def build(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    settings: DeviceSettings,
    device: str,
    block_tokens: int,
    phase: Callable[[str], None],
    why: str,
) -> Built:
    """A model that torch computes, because of `why`."""
    place, dtype = torch.device(device), dtype_of(settings, device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    phase(f"load the weights as {name(dtype)} on {device} (no native kernels: {why})")
    linears = Linears(dtype, place)
    with torch.inference_mode():
        model = Llama(config, checkpoint.tensor, linears.pack, dtype, place, linears.padded)

    def open_with(blocks: int, kept: Kept | None) -> tuple[Forward, Behind]:
        store = TensorStore(config.shape, blocks, block_tokens, dtype, place, kept)
        behind = partial(CudaTier, store) if store.planes is None else partial(HostTier, store.planes)
        return TorchForward(model, linears, store), behind

    weights = linears.nbytes + model.nbytes
    kept = name(dtype)
    return Built(weights, linears.nbytes, kept, kept, "torch", config.shape, dtype.itemsize, open_with)


def name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def dtype_of(settings: DeviceSettings, device: str) -> torch.dtype:
    """`auto` means bf16 where the device multiplies it natively."""
    native = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(settings.dtype)
    return chosen or (torch.bfloat16 if native else torch.float32)
