"""A device at another clock: arithmetic slows as the clock falls, memory and links do not, and power falls with a power
of the clock. Owns the clock of one replica, which somebody may turn while it runs.

    seconds = memory + network + overhead + compute x (full / clock)
    watts   = static + (drawn at full - static) x (clock / full)^1.7

The exponent follows from POLCA (ASPLOS 2024): 1110 of 1410 MHz take a fifth off the peak power of an A100, of which
three tenths are static. Idle power does not depend on the clock.
"""

from __future__ import annotations

from headrace.sim.cost.batch import Batch, CostModel, Line, StepCost

FULL_MHZ = 1410.0  # of an A100
EXPONENT = 1.7


class Clocked:
    """`static_w` is what all devices of the replica draw whatever they do. `mhz` may be set between steps."""

    def __init__(self, cost: CostModel, static_w: float, mhz: float = FULL_MHZ) -> None:
        self._cost = cost
        self._static_w = static_w
        self.mhz = mhz

    def estimate(self, batch: Batch) -> StepCost:
        cost, pace = self._cost.estimate(batch), self.mhz / FULL_MHZ
        if pace == 1:
            return cost
        compute_s = cost.compute_s / pace
        seconds = cost.seconds - cost.compute_s + compute_s
        drawn_w = max(0.0, cost.joules / cost.seconds - self._static_w) if cost.seconds else 0.0
        joules = (min(self._static_w, cost.joules / max(cost.seconds, 1e-12)) + drawn_w * pace**EXPONENT) * seconds
        return cost._replace(seconds=seconds, compute_s=compute_s, joules=joules)

    def line(self, batch: Batch, steps: int) -> Line:
        """The line of the full clock, stretched as its first step is."""
        line = self._cost.line(batch, steps)
        if self.mhz == FULL_MHZ:
            return line
        slower = self.estimate(batch).seconds / self._cost.estimate(batch).seconds
        return Line(line.first_s * slower, line.slope_s * slower, line.steps)
