"""The idealized runtime of a model on fixed hardware without contention (Narayanan et al., 2023): T = F(p) + g (o - 1).

F, the time to the first token, is piecewise linear in the prompt; g, the time of every later token, is one number that
does not depend on the prompt. Two measured curves stand for a whole system; nothing is said about batching.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.cost.fit import BadSamples, non_negative


@dataclass(frozen=True, slots=True)
class Idealized:
    """Knots of F in ascending order, at least one. Beyond the last the last slope continues, and is marked."""

    prompt_tokens: tuple[int, ...]
    prompt_s: tuple[float, ...]
    token_s: float
    watts: float = 0.0

    def first_token_s(self, prompt_tokens: float) -> float:
        """F(p)."""
        knots, values = self.prompt_tokens, self.prompt_s
        if len(knots) == 1:
            return values[0]
        right = min(max(bisect_right(knots, prompt_tokens), 1), len(knots) - 1)
        share = (prompt_tokens - knots[right - 1]) / (knots[right] - knots[right - 1])
        return max(0.0, values[right - 1] + share * (values[right] - values[right - 1]))

    def runtime_s(self, prompt_tokens: float, output_tokens: int) -> float:
        """Seconds from the prompt to the last of `output_tokens` tokens, at least one."""
        return self.first_token_s(prompt_tokens) + self.token_s * (output_tokens - 1)

    def estimate(self, batch: Batch) -> StepCost:
        """A step's prompt tokens as one prompt, and one more token if any row decodes."""
        prompt = batch.prefill_tokens
        compute_s = self.first_token_s(prompt) if prompt else 0.0
        memory_s = self.token_s if batch.decodes else 0.0
        seconds = compute_s + memory_s
        outside = bool(prompt) and not self.prompt_tokens[0] <= prompt <= self.prompt_tokens[-1]
        return StepCost(seconds, compute_s, memory_s, joules=self.watts * seconds, extrapolated=outside)

    def line(self, batch: Batch, steps: int) -> Line:
        return Line(self.estimate(batch).seconds, 0.0, steps)


Run = tuple[int, int, float]  # (prompt tokens, output tokens, seconds)


def fit_idealized(runs: Sequence[Run]) -> Idealized:
    """F at every measured prompt length and g, least squares on all runs, none negative.

    Needs runs of at least two output lengths. Raises BadSamples otherwise, or above eleven prompt lengths.
    """
    knots = sorted({prompt for prompt, _, _ in runs})
    if not runs or len({output for _, output, _ in runs}) < 2:
        raise BadSamples("The time of a token needs runs of at least two output lengths.")
    if len(knots) > 11:
        raise BadSamples(f"{len(knots)} prompt lengths are more knots than the fit takes; use at most 11.")
    matrix = np.zeros((len(runs), len(knots) + 1))
    for row, (prompt, output, _) in zip(matrix, runs, strict=True):
        row[knots.index(prompt)] = 1.0
        row[-1] = output - 1
    *prompt_s, token_s = map(float, non_negative(matrix, np.array([seconds for _, _, seconds in runs])))
    return Idealized(tuple(knots), tuple(prompt_s), token_s)
