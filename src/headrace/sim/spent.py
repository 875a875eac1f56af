"""What the time and energy of the steps went to: the terms of their costs, added up."""

from __future__ import annotations

from dataclasses import dataclass, fields

from headrace.sim.cost.batch import StepCost

TERMS = ("compute", "memory", "network", "overhead", "copy")


@dataclass(slots=True)
class Spent:
    """Sums over steps, by what bounds each operator; see `StepCost`."""

    compute_s: float = 0.0
    memory_s: float = 0.0
    network_s: float = 0.0
    overhead_s: float = 0.0
    copy_s: float = 0.0  # of copies between the tiers that no work hid
    copied_bytes: float = 0.0
    seconds: float = 0.0
    joules: float = 0.0  # 0 when the power of the device is unknown
    flops: float = 0.0
    memory_bytes: float = 0.0
    network_bytes: float = 0.0
    extrapolated_s: float = 0.0  # priced outside of what the cost model was fitted on

    def add(self, cost: StepCost, steps: float = 1) -> None:
        """So many steps of this price, or such a part of one."""
        self.compute_s += steps * cost.compute_s
        self.memory_s += steps * cost.memory_s
        self.network_s += steps * cost.network_s
        self.overhead_s += steps * cost.overhead_s
        self.copy_s += steps * cost.copy_s
        self.copied_bytes += steps * cost.copied_bytes
        self.seconds += steps * cost.seconds
        self.joules += steps * cost.joules
        self.flops += steps * cost.flops
        self.memory_bytes += steps * cost.memory_bytes
        self.network_bytes += steps * cost.network_bytes
        self.extrapolated_s += steps * cost.seconds * cost.extrapolated

    def merge(self, other: Spent) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def shares(self) -> dict[str, float]:
        """Of the time in steps, by term, copies if there were any; all 0 before the first step."""
        terms = TERMS if self.copied_bytes else TERMS[:-1]
        total = sum(getattr(self, f"{term}_s") for term in terms) or 1.0
        return {term: getattr(self, f"{term}_s") / total for term in terms}
