"""The prices in DistServe's artifact as a cost model: OPT-13B in its own engine on A100-80GB, by tensor parallelism.

    prefill  a + b tokens + c tokens^2        decode  a + b context + c batch, another line from 95 requests on

Published coefficients, in milliseconds there; nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.cost.linear import Linear

MANY = 95  # requests side by side from which the second line of decoding is read


@dataclass(frozen=True, slots=True)
class Published:
    """Three lines. A step with any prompt is priced as a prefill of all its tokens."""

    prefill: Linear
    few: Linear
    many: Linear

    def estimate(self, batch: Batch) -> StepCost:
        return self._of(batch).estimate(batch)

    def line(self, batch: Batch, steps: int) -> Line:
        return self._of(batch).line(batch, steps)

    def _of(self, batch: Batch) -> Linear:
        if batch.prefill_tokens:
            return self.prefill
        return self.few if batch.rows < MANY else self.many


_TWO = Linear(13.29e-3, context_s=3.41e-7, sampled_s=0.0630e-3)
OPT_13B: Mapping[int, tuple[Published, int]] = {  # by tensor parallelism: prices, tokens of KV
    1: (
        Published(
            Linear(18.10e-3, 0.10191e-3, 7.12e-9),
            Linear(19.93e-3, context_s=6.27e-7, sampled_s=0.0385e-3),
            Linear(7.17e-3, context_s=5.80e-7, sampled_s=0.1583e-3),
        ),
        66_144,
    ),
    2: (Published(Linear(14.74e-3, 0.06858e-3, 2.45e-9), _TWO, _TWO), 163_008),
}
