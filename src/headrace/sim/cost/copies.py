"""What the copies of a step cost: t = groups * launches * 10 us + bytes / bandwidth of the link to the host, beside the
work of the step or before it (FastSwitch, arXiv:2411.18424). A group is a run of neighbours in the host's memory: a
device gathers its own blocks in no time. Values only; which blocks are copied, the plan says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from headrace.core.ports import least_copied_blocks
from headrace.core.step import DEVICE, Copy, StepPlan
from headrace.sim.hardware import Link

LAUNCH_S = 10e-6  # of one copy, from the paper's vLLM


@dataclass(frozen=True, slots=True)
class HostLink:
    """The way from every device of a replica to the host's memory, each with its part of a block."""

    link: Link
    block_bytes: float  # of one device's part, all layers
    launches: int  # copies for a group: of each layer's keys and values, if a block is scattered over its planes
    launch_s: float = LAUNCH_S
    in_groups: bool = True  # False: block by block, as vLLM 0.3.3
    beside_work: bool = True  # False: the step's work begins when all copies are over, likewise

    def seconds(self, copies: Sequence[Copy]) -> float:
        """One after the other."""
        return sum(map(self._one, copies))

    def step_s(self, plan: StepPlan, work_s: float) -> float:
        """Of a step whose work takes `work_s`. Work that takes blocks that are copied out waits for that."""
        if not self.beside_work:
            return self.seconds(plan.copies) + work_s
        out_s = self.seconds([copy for copy in plan.copies if copy.source_tier == DEVICE])
        in_s = self.seconds([copy for copy in plan.copies if copy.source_tier != DEVICE])
        return out_s + max(in_s, work_s) if plan.overwrites else max(out_s + in_s, work_s)

    def least_blocks(self, block_s: float) -> int:
        """The fewest blocks of one request that are quicker to copy in, as one group, than to compute, at `block_s`
        each."""
        once_s = self.launches * self.launch_s + self.link.latency_s
        return least_copied_blocks(once_s, self.block_bytes / self.link.bytes_per_s, block_s)

    def _one(self, copy: Copy) -> float:
        on_host = [target if copy.source_tier == DEVICE else source for source, target in copy.pairs]
        groups = 1 + sum(a + 1 != b for a, b in pairwise(on_host)) if self.in_groups else len(on_host)
        moved_s = len(on_host) * self.block_bytes / self.link.bytes_per_s
        return self.link.latency_s + groups * self.launches * self.launch_s + moved_s
