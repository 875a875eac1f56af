"""The KV blocks that the host keeps, and the copies between it and the device. Owns the host's memory; which block
holds what is the scheduler's business. Here the device is a CPU, and copies are made where they are asked for;
`cudatier` makes them beside the work of the step.

    host      [blocks, planes, kv_heads, block_tokens, head_dim]     planes: K and V of every layer

A block lies in one piece here, in all its layers, so a run of neighbours crosses the link as one copy; the device
gathers and scatters its planes at the speed of its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from headrace.core.clock import perf
from headrace.core.step import DEVICE, HOST, Block, Copy, StepPlan
from headrace.device.kvstore import KVStore

_RUN_BLOCKS = 64  # of one copy at most: bounds the memory that gathers it


class Tier(Protocol):
    """`blocks` host blocks behind one device's store."""

    @property
    def nbytes(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    def begin(self, plan: StepPlan) -> None:
        """Begin the copies of a plan. What its work does afterwards may take the blocks that are copied out: it waits
        for those copies if it does."""
        ...

    def end(self) -> None:
        """The copies are over when what follows begins, and the host may read what came out."""
        ...

    def wait(self) -> None:
        """Until all copies have been made."""
        ...


class HostTier:
    """A `Tier` behind a CPU."""

    def __init__(self, store: KVStore, blocks: int) -> None:
        self._store = store
        plane = store.keys[0]
        shape = (blocks, 2 * len(store.keys), plane.shape[0], store.block_tokens, plane.shape[-1])
        self._blocks = np.zeros(shape, plane.dtype)

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    @property
    def blocks(self) -> int:
        return len(self._blocks)

    def begin(self, plan: StepPlan) -> None:
        for copy in plan.copies:
            if copy.source_tier == DEVICE:
                self._out(copy)
        for copy in plan.copies:
            if copy.source_tier != DEVICE:
                self._in(copy)

    def end(self) -> None:
        """All were made at once."""

    def wait(self) -> None:
        """All were made at once."""

    def _out(self, copy: Copy) -> None:
        for targets, sources in runs([(target, source) for source, target in copy.pairs]):
            for at, plane in enumerate(self._planes()):
                self._blocks[targets, at] = plane[:, sources].swapaxes(0, 1)

    def _in(self, copy: Copy) -> None:
        for sources, targets in runs(copy.pairs):
            for at, plane in enumerate(self._planes()):
                plane[:, targets] = self._blocks[sources, at].swapaxes(0, 1)

    def _planes(self) -> Iterator[np.ndarray]:
        """Each as [kv_heads, blocks, block_tokens, head_dim]."""
        store = self._store
        for plane in (*store.keys, *store.values):
            heads, _, width = plane.shape
            yield plane.reshape(heads, store.blocks, store.block_tokens, width)


def seconds(tier: Tier, count: int) -> float:
    """What copying so many neighbours in takes, the better of two after one to warm up. Writes the first blocks of both
    tiers, so only before the first plan."""
    copy = Copy(HOST, DEVICE, tuple((block, block) for block in range(count)))
    times = []
    for _ in range(3):
        begin = perf()
        tier.begin(StepPlan(0, (), copies=(copy,)))
        tier.wait()
        times.append(perf() - begin)
    return min(times[1:])


def runs(pairs: Sequence[tuple[Block, Block]]) -> Iterator[tuple[slice, list[Block]]]:
    """Of pairs sorted by their first: neighbours there, as a slice, and what they are paired with."""
    begin = 0
    for end in range(1, len(pairs) + 1):
        first = pairs[begin][0]
        if end == len(pairs) or pairs[end][0] != first + end - begin or end - begin == _RUN_BLOCKS:
            yield slice(first, first + end - begin), [other for _, other in pairs[begin:end]]
            begin = end
