"""The KV blocks that the host keeps, and the copies between it and the device. Owns the host's memory and, on a device
that has them, the side stream; which block holds what is the scheduler's business.

    host      [blocks, planes, kv_heads, block_tokens, head_dim]     planes: K and V of every layer

A block lies in one piece here, in all its layers, so a run of neighbours crosses the link as one copy; the device
gathers and scatters its planes at the speed of its own memory.

    step n    compute stream   | --- work ---------------- | wait for the side stream |
              side stream      | out, run by run | in      |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from headrace.core.clock import perf
from headrace.core.step import DEVICE, HOST, Block, Copy, StepPlan
from headrace.device.kvstore import KVStore

_RUN_BLOCKS = 64  # of one copy at most: bounds the memory that gathers it


class HostTier:
    """`blocks` host blocks behind one device's store. On a CPU the copies are made where they are asked for; on CUDA
    they go on beside the work of the step, from and to pinned memory."""

    def __init__(self, store: KVStore, blocks: int) -> None:
        self._store = store
        plane = store.keys[0]
        self._cuda = plane.device.type == "cuda"
        width = (plane.shape[0], store.block_tokens, plane.shape[-1])
        shape = (blocks, 2 * len(store.keys), *width)
        self._blocks = torch.zeros(shape, dtype=plane.dtype, pin_memory=self._cuda)
        self._side = torch.cuda.Stream(plane.device) if self._cuda else None

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    @property
    def blocks(self) -> int:
        return len(self._blocks)

    def begin(self, plan: StepPlan) -> None:
        """Begin the copies of a plan. What its work does on the current stream afterwards may take the blocks that are
        copied out: it waits for those copies if it does."""
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._side.device))  # what earlier steps computed
        with self._beside():
            for copy in plan.copies:
                if copy.source_tier == DEVICE:
                    self._out(copy)
        if self._side is not None and plan.overwrites:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        with self._beside():
            for copy in plan.copies:
                if copy.source_tier != DEVICE:
                    self._in(copy)

    def end(self) -> None:
        """The copies are over when what follows on the current stream begins, and the host may read what came out."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def seconds(self, count: int) -> float:
        """What copying so many neighbours in takes, the better of two after one to warm up. Writes the first blocks of
        both tiers, so only before the first plan."""
        copy = Copy(HOST, DEVICE, tuple((block, block) for block in range(count)))
        times = []
        for _ in range(3):
            begin = perf()
            self.begin(StepPlan(0, (), copies=(copy,)))
            if self._side is not None:
                self._side.synchronize()
            times.append(perf() - begin)
        return min(times[1:])

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _out(self, copy: Copy) -> None:
        for targets, sources in _runs([(target, source) for source, target in copy.pairs]):
            into = self._blocks[targets]
            if not self._cuda:
                self._gather(sources, into)
                continue
            staged = torch.empty(into.shape, dtype=into.dtype, device=self._store.keys[0].device)
            self._gather(sources, staged)
            into.copy_(staged, non_blocking=True)

    def _in(self, copy: Copy) -> None:
        for sources, targets in _runs(copy.pairs):
            run = self._blocks[sources]
            self._scatter(targets, run.to(self._store.keys[0].device, non_blocking=True) if self._cuda else run)

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


def _runs(pairs: Sequence[tuple[Block, Block]]) -> Iterator[tuple[slice, list[Block]]]:
    """Of pairs sorted by their first: neighbours there, as a slice, and what they are paired with."""
    begin = 0
    for end in range(1, len(pairs) + 1):
        first = pairs[begin][0]
        if end == len(pairs) or pairs[end][0] != first + end - begin or end - begin == _RUN_BLOCKS:
            yield slice(first, first + end - begin), [other for _, other in pairs[begin:end]]
            begin = end
