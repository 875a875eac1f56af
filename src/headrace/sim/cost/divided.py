"""What a step takes on a share of a device while another step runs on the rest. Prices only; when steps meet is the
executor's business.

    compute    c(R) of the peak with the share R of the compute units: two regimes, proportional up to a knee, less
               beyond it (the form of Nexus, arXiv:2507.06608)
    bandwidth  b(R): few units draw all of it
    meeting    what was promised twice is shared: R / (x + y) if x + y > 1 (semi-PD, arXiv:2504.19867). If the two
               together want f > 1 times the bandwidth there is, what is bound by memory takes f times as long

The knees are chosen here; nobody published them with a device's name. Energy is that of the work on the whole device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from headrace.engine.policies.lanes import Load, Shares
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, CostModel, Line, Spans, StepCost

_GRAIN = 100  # shares are told apart in percent


class Knee(NamedTuple):
    """speed(R) rises with slope 1 up to `at` and with slope `after` beyond it, scaled so that speed(1) = 1."""

    at: float
    after: float

    def speed(self, share: float) -> float:
        return self._rise(share) / self._rise(1.0)

    def _rise(self, share: float) -> float:
        return min(share, self.at) + self.after * max(0.0, share - self.at)


COMPUTE = Knee(0.8, 0.5)
BANDWIDTH = Knee(0.4, 0.0)

Price = Callable[[CostModel], StepCost]  # of one step, by any model


class Divided:
    """Prices for two lanes on the device of `whole`."""

    def __init__(self, whole: CostModel, compute: Knee = COMPUTE, bandwidth: Knee = BANDWIDTH) -> None:
        self._whole = whole
        self._compute, self._bandwidth = compute, bandwidth
        self._slice = cache(self._sliced)

    def beside(self, steps: Sequence[tuple[Price, float]]) -> list[StepCost]:
        """The price of each of these steps on its share, for as long as exactly these run side by side."""
        promised = max(1.0, sum(share for _, share in steps))
        wholes = [price(self._whole) for price, _ in steps]
        costs = [price(self._slice(round(_GRAIN * share / promised))) for price, share in steps]
        wanted = sum(map(self._drawn, wholes, costs))
        return [_stretched(cost, wanted, whole.joules) for cost, whole in zip(costs, wholes, strict=True)]

    def predict(self, loads: tuple[Load | None, ...], shares: Shares) -> Shares:
        """What `engine.policies.lanes.Predict` asks; windows of attention count as if there were none."""
        lanes = [lane for lane, load in enumerate(loads) if load]
        seconds = [0.0, 0.0]
        asked = [(price_of(batch_of_load(load)), share) for load, share in zip(loads, shares, strict=True) if load]
        for lane, cost in zip(lanes, self.beside(asked), strict=True):
            seconds[lane] = cost.seconds
        return seconds[0], seconds[1]

    def _drawn(self, whole: StepCost, cost: StepCost) -> float:
        """The part of the bandwidth that a step draws while it runs."""
        if not cost.seconds:
            return 0.0
        if isinstance(self._whole, Analytic):
            bytes_per_s = self._whole.bytes_per_s * self._whole.placement.parallel.tensor
            return min(1.0, whole.memory_bytes / bytes_per_s / cost.seconds)
        return min(1.0, whole.memory_s / cost.seconds)

    def _sliced(self, percent: int) -> CostModel:
        share = max(percent, 1) / _GRAIN
        compute, bandwidth = self._compute.speed(share), self._bandwidth.speed(share)
        if isinstance(self._whole, Analytic):
            return _on_part(self._whole, compute, bandwidth)
        return _Slowed(self._whole, compute, bandwidth)


class _Slowed:
    """Any model on a part of its device, by the terms of its prices: nothing changes what bounds an operator."""

    def __init__(self, whole: CostModel, compute: float, bandwidth: float) -> None:
        self._whole, self._compute, self._bandwidth = whole, compute, bandwidth

    def estimate(self, batch: Batch) -> StepCost:
        cost = self._whole.estimate(batch)
        memory_s = cost.memory_s / self._bandwidth
        compute_s = (cost.seconds - cost.memory_s - cost.network_s - cost.overhead_s) / self._compute
        seconds = compute_s + memory_s + cost.network_s + cost.overhead_s
        return cost._replace(seconds=seconds, compute_s=compute_s, memory_s=memory_s)

    def line(self, batch: Batch, steps: int) -> Line:
        return Line(self.estimate(batch).seconds, 0.0, 1)


def _stretched(cost: StepCost, wanted: float, joules: float) -> StepCost:
    more_s = max(0.0, wanted - 1.0) * cost.memory_s
    return cost._replace(seconds=cost.seconds + more_s, memory_s=cost.memory_s + more_s, joules=joules)


def price_of(batch: Batch) -> Price:
    return lambda model: model.estimate(batch)


def batch_of_load(load: Load) -> Batch:
    spans = Spans(load.pairs, load.prefill_context, load.decode_context, growing=load.decodes)
    reach = max(load.pairs, load.prefill_context)
    return Batch(load.rows, load.tokens, load.sampled, load.decodes, reach, spans)


def _on_part(whole: Analytic, compute: float, bandwidth: float) -> Analytic:
    """The same placement on a device with parts of its peaks."""
    chip = whole.placement.device
    slow = replace(
        chip,
        bf16_flops_per_s=chip.bf16_flops_per_s * compute,
        fp32_flops_per_s=chip.fp32_flops_per_s * compute,
        fp8_flops_per_s=chip.fp8_flops_per_s * compute,
        int8_flops_per_s=chip.int8_flops_per_s * compute,
        fp4_flops_per_s=chip.fp4_flops_per_s * compute,
        memory_bytes_per_s=chip.memory_bytes_per_s * bandwidth,
    )
    placement = replace(whole.placement, topology=replace(whole.placement.topology, device=slow))
    return Analytic(placement, whole.convention, host_s=whole.host_s)
