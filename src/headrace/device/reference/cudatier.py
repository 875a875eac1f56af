"""The KV blocks that the host keeps behind a CUDA device. Owns pinned memory and the side stream.

    step n    compute stream   | --- work ---------------- | wait for the side stream |
              side stream      | out, run by run | in      |

`hosttier` says how blocks lie, and is the same without streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headrace.core.step import DEVICE, Block, Copy, StepPlan
from headrace.device.hosttier import runs
from headrace.device.reference.tensorstore import TensorStore


class CudaTier:
    """A `Tier` whose copies go on beside the work of the step, from and to pinned memory."""

    def __init__(self, store: TensorStore, blocks: int) -> None:
        self._store = store
        plane = store.keys[0]
        self._device = plane.device
        shape = (blocks, 2 * len(store.keys), plane.shape[0], store.block_tokens, plane.shape[-1])
        self._blocks = torch.zeros(shape, dtype=plane.dtype, pin_memory=True)
        self._side = torch.cuda.Stream(self._device)

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    @property
    def blocks(self) -> int:
        return len(self._blocks)

    def begin(self, plan: StepPlan) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))  # what earlier steps computed
        with torch.cuda.stream(self._side):
            for copy in plan.copies:
                if copy.source_tier == DEVICE:
                    self._out(copy)
        if plan.overwrites:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        with torch.cuda.stream(self._side):
            for copy in plan.copies:
                if copy.source_tier != DEVICE:
                    self._in(copy)

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._side)

    def wait(self) -> None:
        self._side.synchronize()

    def _out(self, copy: Copy) -> None:
        for targets, sources in runs([(target, source) for source, target in copy.pairs]):
            into = self._blocks[targets]
            staged = torch.empty(into.shape, dtype=into.dtype, device=self._device)
            self._gather(sources, staged)
            into.copy_(staged, non_blocking=True)

    def _in(self, copy: Copy) -> None:
        for sources, targets in runs(copy.pairs):
            self._scatter(targets, self._blocks[sources].to(self._device, non_blocking=True))

    def _gather(self, blocks: Sequence[Block], into: Tensor) -> None:
        """Device blocks to `into` [blocks, planes, kv_heads, block_tokens, head_dim]."""
        index = torch.tensor(blocks, device=into.device)
        for plane, target in zip(self._planes(), into.unbind(1), strict=True):
            target.copy_(plane.index_select(1, index).transpose(0, 1))

    def _scatter(self, blocks: Sequence[Block], run: Tensor) -> None:
        index = torch.tensor(blocks, device=run.device)
        for plane, source in zip(self._planes(), run.unbind(1), strict=True):
            plane.index_copy_(1, index, source.transpose(0, 1))

    def _planes(self) -> Iterator[Tensor]:
        """Each as [kv_heads, blocks, block_tokens, head_dim]."""
        store = self._store
        for plane in (*store.keys, *store.values):
            heads, _, width = plane.shape
            yield plane.view(heads, store.blocks, store.block_tokens, width)
