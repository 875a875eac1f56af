"""Who is next, by when answers are due: dispatching rules of single-machine scheduling over predicted service times.
The rules are functions of numbers; `Due` predicts the numbers and owns what it predicts from.

A request is due at its deadline, or when its SLO says that the last token is; without either, LONGEST_S after it came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from headrace.core.config import EngineSettings
from headrace.core.events import Arrived, Event, Finished, StepDone
from headrace.core.step import Run
from headrace.core.types import Request, RequestId
from headrace.engine.policies.joints import RequestView
from headrace.engine.policies.lengths import Lengths

LONGEST_S = 600.0  # what is due later, or never, counts as due so long after its arrival
PATIENCE_S = 600.0  # so long after it was due a request is served by its due date alone; no service is longer than that
CHUNK_TOKENS = 512  # of a prompt in one step, where no token budget is set
_FORGETTING = 1 / 256  # weight of the last step in the mean duration of a step


class Job(NamedTuple):
    """What a rule knows: both in seconds, the date on the clock of the rule's `t`."""

    service_s: float
    due_s: float


Rule = Callable[[Sequence[Job], float], list[float]]  # (jobs that wait, t) -> keys, smallest next


def mdd(jobs: Sequence[Job], t: float) -> list[float]:
    """Modified due date (Baker and Bertrand 1982): max(t + p, d). By date while there is time, shortest first when
    there is none."""
    return [max(t + p, d) for p, d in jobs]


def mddc(jobs: Sequence[Job], t: float) -> list[float]:
    """MDD as a language model improved it (arXiv:2510.24013): mu = max(t + 1.1 p, d), rho = min(p / (t + longest), 1),
    theta = rho^2 / (1 + rho^2), and the key mu (1 + theta) + p / (t + mean p). Here t counts from when the machine last
    was idle."""
    longest = max((p for p, _ in jobs), default=0.0)
    mean = sum(p for p, _ in jobs) / max(len(jobs), 1)
    keys = []
    for p, d in jobs:
        rho = min(p / max(t + longest, 1e-9), 1.0)
        theta = rho * rho / (1 + rho * rho)
        keys.append(max(t + 1.1 * p, d) * (1 + theta) + p / max(t + mean, 1e-9))
    return keys


def eddc(jobs: Sequence[Job], t: float) -> list[float]:
    """EDD with a correction of its last two jobs (arXiv:2510.24013): they change places if the earlier one would be
    done before it is due. That is the rule as printed; it never lowers the sum of tardiness, so the gains the paper
    reports for it must come from another."""
    keys = [d for _, d in jobs]
    order = sorted(range(len(jobs)), key=lambda at: (jobs[at].due_s, jobs[at].service_s))
    if len(order) > 1:
        *before, last = order
        if jobs[before[-1]].due_s > t + sum(jobs[at].service_s for at in before):
            keys[before[-1]], keys[last] = keys[last], keys[before[-1]]
    return keys


def slack(jobs: Sequence[Job], t: float) -> list[float]:
    """Urgency (HexGen-Flow): predicted work minus what is left until the due date, the most urgent first. The clock
    cancels out: d - p."""
    return [d - p for p, d in jobs]


def due_s(request: Request) -> float:
    """When it is due on the clock of its arrival, never before that and at most LONGEST_S later."""
    arrival_s, due = request.arrival_s, math.inf
    if (slo := request.slo) is not None and (slo.ttft_s, slo.tpot_s) != (None, None):
        due = arrival_s + (slo.ttft_s or 0.0) + (slo.tpot_s or 0.0) * (request.max_new_tokens - 1)
    if request.deadline_s is not None:
        due = min(due, request.deadline_s)
    return max(arrival_s, min(due, arrival_s + LONGEST_S))


def edd(request: RequestView, now: float) -> float:
    """Earliest due date first (Jackson 1955).

    The bound: nobody who arrives after a request was due goes before it, so at most LONGEST_S of later arrivals do.
    """
    return due_s(request.request)


class Due:
    """Orders those who wait by a rule, and those who run by the same rule, for when one of them must yield.

    Predicted service: one step per chunk of the prompt and one per token that the median of past answers still has to
    go, times the mean duration of a step. Counted from tokens drawn, not computed: a preemption changes nobody's place.

    The bound: keys are at most `due_s` + PATIENCE_S, and nobody's are below its arrival, but for `slack` by at most
    PATIENCE_S; so at most LONGEST_S + 2 * PATIENCE_S of later arrivals ever overtake a request.
    """

    def __init__(self, rule: Rule, settings: EngineSettings) -> None:
        self._rule = rule
        self._lengths = Lengths(settings.length_window)
        self._chunk_tokens = settings.token_budget or CHUNK_TOKENS
        self._step_s = settings.inter_token_ms / 1000
        self._live = 0
        self._busy_since_s = 0.0
        self._keys: dict[RequestId, float] = {}

    def observe(self, event: Event) -> None:
        match event:
            case StepDone():
                self._step_s = _mean(self._step_s, event.run)
            case Arrived():
                self._busy_since_s = self._busy_since_s if self._live else event.at_s
                self._live += 1
            case Finished():
                self._live -= 1
                self._lengths.observe(event)

    def survey(self, requests: Sequence[RequestView], now: float) -> None:
        running, waiting = [one for one in requests if one.running], [one for one in requests if not one.running]
        self._keys = {}
        for group in (running, waiting):
            jobs = [Job(self.service_s(one), due_s(one.request) - self._busy_since_s) for one in group]
            keys = self._rule(jobs, now - self._busy_since_s)
            for one, job, key in zip(group, jobs, keys, strict=True):
                self._keys[one.request.id] = self._busy_since_s + min(key, job.due_s + PATIENCE_S)

    def __call__(self, request: RequestView, now: float) -> float:
        return self._keys.get(request.request.id, due_s(request.request))

    def service_s(self, request: RequestView) -> float:
        """Predicted seconds until it is done, if nobody were in its way."""
        prompt, drawn = request.prompt_tokens, request.known_tokens - request.prompt_tokens
        left = self._lengths.quantile(0.5, drawn, request.limit_tokens - prompt) - drawn
        steps = -(-prompt // self._chunk_tokens) + max(left - 1, 0)  # the last chunk draws the first token
        return min(PATIENCE_S, self._step_s * steps)


def _mean(mean_s: float, run: Run) -> float:
    """The fading mean after all repetitions of a run: what `mean += _FORGETTING * (seconds - mean)` for each of them
    comes to."""
    kept = (1 - _FORGETTING) ** run.steps
    return kept * mean_s + (1 - kept) * run.first_s + run.slope_s * (run.steps - (1 - kept) / _FORGETTING)
