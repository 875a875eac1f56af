"""The few-shot cost model: a roofline corrected by at most ten measurements of the device at hand.

HELP's idea (NeurIPS 2021) with the roofline as the embedding: its terms (compute, memory, network, overhead) are the
features, and a small regression finds how much slower each really is. A prior, learned on other devices or neutral,
says what to believe while samples are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.sim.cost.batch import Batch, CostModel, Line, StepCost, batch_of, trace_line
from headrace.sim.cost.fit import Array, Range, Sample, checked, non_negative

NOISE = 0.03  # relative error of one measured step


# factors of compute, memory, network and overhead, and seconds added to every step
Corrections = tuple[float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Prior:
    """Mean and spread of corrections."""

    mean: Corrections = (1.0, 1.0, 1.0, 1.0, 0.0)
    spread: Corrections = (0.5, 0.5, 0.5, 0.5, 0.01)


NEUTRAL = Prior()


@dataclass(frozen=True, slots=True)
class FewShot:
    """seconds = corrections . (compute, memory, network, overhead of the roofline, 1).

    Corrections found on one placement may be put on the roofline of another of the same engine and device; `measured`
    is then None, and nothing is marked.
    """

    roofline: CostModel
    corrections: Corrections
    measured: Range | None = None
    strict: bool = False

    def estimate(self, batch: Batch) -> StepCost:
        outside = self.measured is not None and self.measured.leaves(batch, self.strict)
        cost = self.roofline.estimate(batch)
        compute, memory, network, overhead, step_s = self.corrections
        compute_s, memory_s, network_s = compute * cost.compute_s, memory * cost.memory_s, network * cost.network_s
        overhead_s = overhead * cost.overhead_s + step_s
        seconds = compute_s + memory_s + network_s + overhead_s + cost.copy_s
        watts = cost.joules / cost.seconds if cost.seconds else 0.0
        return StepCost(
            seconds,
            compute_s,
            memory_s,
            network_s,
            overhead_s,
            watts * seconds,
            cost.flops,
            cost.memory_bytes,
            cost.network_bytes,
            cost.copy_s,
            cost.copied_bytes,
            outside,
        )

    def line(self, batch: Batch, steps: int) -> Line:
        """As far as the roofline is straight, no term changes hands, and the corrected sum is straight too."""
        straight = self.roofline.line(batch, steps).steps
        measured = self.measured if self.strict else None
        while measured is not None and straight > 1 and batch.advanced(straight - 1) not in measured:
            straight //= 2
        return trace_line(self, batch, straight)


def find_corrections(steps: Sequence[tuple[StepCost, float]], prior: Prior = NEUTRAL) -> Corrections:
    """The most probable corrections of (roofline's cost, measured seconds) pairs, none negative.

    Ridge regression on relative errors towards the prior.
    """
    terms = [(cost.compute_s, cost.memory_s, cost.network_s, cost.overhead_s, 1.0) for cost, _ in steps]
    matrix: Array = np.array(terms) / np.array([[seconds] for _, seconds in steps])
    mean, spread = np.array(prior.mean), np.maximum(np.array(prior.spread), 1e-9)
    believed = np.diag(NOISE / spread)
    rows = np.vstack([matrix, believed])
    target = np.concatenate([np.ones(len(steps)), believed @ mean])
    return _five(non_negative(rows, target))


def fit_few(roofline: CostModel, samples: Sequence[Sample], prior: Prior = NEUTRAL, *, strict: bool = False) -> FewShot:
    """Correct a roofline by measured steps; one is enough to begin, ten are enough."""
    checked(samples, 1)
    steps = [(roofline.estimate(sample.batch), sample.seconds) for sample in samples]
    return FewShot(roofline, find_corrections(steps, prior), Range.of(samples), strict)


def learn_prior(fits: Sequence[FewShot]) -> Prior:
    """What corrections look like on devices already known: their mean and spread, never narrower than a tenth."""
    found = np.array([fit.corrections for fit in fits])
    mean = found.mean(axis=0)
    spread = np.maximum(found.std(axis=0), 0.1 * np.abs(mean) + 1e-6)
    return Prior(_five(mean), _five(spread))


def _five(values: Array) -> Corrections:
    compute, memory, network, overhead, step_s = map(float, values)
    return compute, memory, network, overhead, step_s


def reference_batches(most_tokens: int = 2048, most_context: int = 4096, windows: tuple[int, ...] = ()) -> list[Batch]:
    """Ten steps that separate the terms, the same for every device: decodes few and many, short and long; prefills
    short and long, fresh and after a prefix; one mixed step."""
    few, many = max(1, most_tokens // 256), max(2, most_tokens // 16)
    rows = [
        [(16, 1)],
        [(most_context - 1, 1)],
        [(16, 1)] * few,
        [(most_context - 1, 1)] * few,
        [(16, 1)] * many,
        [(0, max(2, most_tokens // 32))],
        [(0, max(2, most_tokens // 4))],
        [(0, max(2, most_tokens))],
        [(most_context - most_tokens // 4, max(2, most_tokens // 4))],
        [(0, max(2, most_tokens // 2)), *[(most_context // 2, 1)] * few],
    ]
    return [batch_of(row, len(row), windows) for row in rows]
