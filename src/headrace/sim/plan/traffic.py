"""What the planner knows of a workload before it simulates: how much comes, and how long it is. One pass, no times of
its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headrace.core.config import BadSetting
from headrace.core.types import SLO
from headrace.workload.arrival import Arrival

MOST_PAIRS = 400  # (prompt, output) kept for bounds, evenly over the traffic


@dataclass(frozen=True, slots=True)
class Demand:
    """The traffic in numbers. `pairs` are (prompt tokens that nobody shares, all prompt tokens, output tokens)."""

    requests: int
    span_s: float  # from the first to the last arrival
    own_tokens: float  # of a mean prompt, what no other prompt could have left in a cache
    prompt_tokens: float
    output_tokens: float
    longest: int  # prompt and answer of the longest request
    pairs: tuple[tuple[int, int, int], ...]
    slo: SLO | None

    @property
    def rate(self) -> float:
        """Requests per second."""
        return (self.requests - 1) / self.span_s if self.span_s else float("inf")


def demand(arrivals: Iterable[Arrival], slo: SLO | None) -> Demand:
    """Raises BadSetting for traffic without times or without requests."""
    rows = [(one.at_s, _own(one), one.prompt_tokens, one.output_tokens) for one in arrivals]
    if not rows:
        raise BadSetting("there is no traffic to plan for; give --trace or --arrivals")
    times = [at_s for at_s, *_ in rows if at_s is not None]
    if len(times) < len(rows):
        raise BadSetting("a plan needs to know when requests come; give --arrivals with a rate, such as poisson:6")
    count = len(rows)
    step = max(1, count // MOST_PAIRS)
    return Demand(
        count,
        times[-1] - times[0],
        sum(own for _, own, _, _ in rows) / count,
        sum(prompt for _, _, prompt, _ in rows) / count,
        sum(output for *_, output in rows) / count,
        max(prompt + output for _, _, prompt, output in rows),
        tuple((own, prompt, output) for _, own, prompt, output in rows[::step]),
        slo,
    )


def _own(arrival: Arrival) -> int:
    """Tokens of the last stretch if it has no name, at least one: a last token is always computed."""
    last = arrival.prompt[-1]
    return max(1, last.tokens if last.name is None else 0)
