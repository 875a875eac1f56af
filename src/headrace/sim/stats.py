"""What came of a simulation, counted while it runs: an `Observer` of one replica in memory bounded by the requests in
flight. Counts, sums and means are exact; quantiles are those of `sketch`. Statistics of several replicas merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from math import inf
from struct import pack
from typing import Any

from headrace.core.events import (
    Admitted,
    Arrived,
    Decoded,
    Drew,
    Event,
    Finished,
    Idle,
    Planned,
    Preempted,
    Rejected,
    StepDone,
    Verified,
)
from headrace.core.types import SLO, FinishReason, RequestId
from headrace.sim.gaps import Gaps
from headrace.sim.lives import Lives
from headrace.sim.sketch import Course, Sketch
from headrace.sim.spent import Spent

COMPLETED = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(slots=True)
class Totals:
    """Sums and distributions over requests and steps. Times in seconds; only completed requests have latencies."""

    arrived: int = 0
    rejected: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by reason
    good: int = 0  # completed within every promise of their SLO
    promised: int = 0  # had an SLO, by themselves or by default
    prompt_tokens: int = 0  # of completed requests
    output_tokens: int = 0  # of completed requests
    cached_tokens: int = 0  # found in the prefix cache at first admissions
    queried_tokens: int = 0  # looked for there
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of these
    preemptions: int = 0
    lost_tokens: int = 0  # computed, and to be computed again or found
    plans: int = 0
    steps: int = 0
    computed_tokens: int = 0
    busy_s: float = 0.0  # in steps, summed over replicas
    used_block_s: float = 0.0  # the integral of the used blocks over steps
    first_s: float = inf  # the first arrival
    last_s: float = 0.0  # the last event
    ttft_s: Sketch = field(default_factory=Sketch)
    tpot_s: Sketch = field(default_factory=Sketch)
    itl_s: Sketch = field(default_factory=Sketch)
    longest_itl_s: Sketch = field(default_factory=Sketch)  # of each request
    e2e_s: Sketch = field(default_factory=Sketch)
    queue_s: Sketch = field(default_factory=Sketch)
    used_blocks: Course = field(default_factory=Course)
    running: Course = field(default_factory=Course)
    waiting: Course = field(default_factory=Course)
    spent: Spent = field(default_factory=Spent)
    lives: Lives = field(default_factory=Lives)

    def merge(self, other: Totals) -> None:
        """Add what another replica did meanwhile."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Sketch | Course | Spent | Lives):
                mine.merge(theirs)
            elif isinstance(mine, dict):
                mine |= {key: mine.get(key, 0) + count for key, count in theirs.items()}
            elif one.name == "first_s":
                self.first_s = min(mine, theirs)
            elif one.name == "last_s":
                self.last_s = max(mine, theirs)
            else:
                setattr(self, one.name, mine + theirs)

    @property
    def completed(self) -> int:
        return sum(self.finished.get(reason, 0) for reason in COMPLETED)

    @property
    def span_s(self) -> float:
        """From the first arrival to the last event."""
        return max(0.0, self.last_s - self.first_s)

    def per_second(self) -> Mapping[str, float]:
        """Throughput over the whole span."""
        span_s = self.span_s or inf
        counts = {"requests": self.completed, "good requests": self.good}
        counts |= {"prompt tokens": self.prompt_tokens, "output tokens": self.output_tokens}
        return {name: count / span_s for name, count in counts.items()}


class Stats:
    """Observes one replica. `slo` is for requests without one. The digest is that of all events in their order, the
    same in every process; a run that takes many steps at once tells of them in fewer events, so it has another."""

    def __init__(self, slo: SLO | None = None) -> None:
        self.totals = Totals()
        self._slo = slo
        self._slos: dict[RequestId, SLO] = {}
        self._gaps = Gaps()
        self.totals.itl_s = self._gaps.all
        self._hash = blake2b(digest_size=16)
        self._log = self._hash.update
        self._fold: Mapping[type, Callable[[Any], None]] = {
            StepDone: self._step,
            Planned: self._plan,
            Idle: lambda event: None,
            Decoded: self._decode,
            Drew: self._draw,
            Finished: self._finish,
            Arrived: self._arrive,
            Admitted: self._admit,
            Verified: self._verify,
            Preempted: self._preempt,
            Rejected: self._reject,
        }

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def observe(self, event: Event) -> None:
        self._fold[type(event)](event)
        self.totals.last_s = event.at_s

    def _plan(self, event: Planned) -> None:
        totals = self.totals
        totals.plans += 1
        totals.running.add(event.at_s, event.running)
        totals.waiting.add(event.at_s, event.waiting)
        self._log(pack("<cdqqq", b"p", event.at_s, event.requests, event.tokens, event.used_blocks))

    def _decode(self, event: Decoded) -> None:
        self._gaps.decoded(event)
        self._log(pack("<cdqq", b"b", event.at_s, event.requests, event.run.steps))

    def _draw(self, event: Drew) -> None:
        self._gaps.drew(event)
        self._note(b"t", event.at_s, *event.request_ids)

    def _verify(self, event: Verified) -> None:
        drafted, accepted = sum(event.drafted), sum(event.accepted)
        self.totals.drafted_tokens += drafted
        self.totals.accepted_tokens += accepted
        self._log(pack("<cdqq", b"v", event.at_s, drafted, accepted))

    def _preempt(self, event: Preempted) -> None:
        self.totals.preemptions += 1
        self.totals.lost_tokens += event.lost_tokens
        self._gaps.preempted(event.request_id)
        self._note(b"y", event.at_s, event.request_id)

    def _reject(self, event: Rejected) -> None:
        totals = self.totals
        totals.arrived += 1
        totals.rejected += 1
        totals.first_s = min(totals.first_s, event.at_s)
        self._note(b"r", event.at_s, event.request_id)

    def _note(self, kind: bytes, at_s: float, *words: str) -> None:
        self._log(pack("<cd", kind, at_s) + "\0".join(words).encode("utf-8", "surrogatepass"))

    def _step(self, event: StepDone) -> None:
        totals = self.totals
        totals.steps += event.run.steps
        totals.computed_tokens += event.tokens * event.run.steps
        totals.busy_s += event.seconds
        totals.used_block_s += event.used_block_s
        totals.used_blocks.add(event.at_s, event.used_blocks)

    def _arrive(self, event: Arrived) -> None:
        totals = self.totals
        totals.arrived += 1
        totals.first_s = min(totals.first_s, event.at_s)
        slo = (event.request and event.request.slo) or self._slo
        if slo is not None:
            totals.promised += 1
            self._slos[event.request_id] = slo
        self._note(b"a", event.at_s, event.request_id)

    def _admit(self, event: Admitted) -> None:
        if not event.again:
            self.totals.queue_s.add(event.queue_s)
            self.totals.cached_tokens += event.cached_tokens
        self._note(b"s", event.at_s, event.request_id)

    def _finish(self, event: Finished) -> None:
        totals, usage = self.totals, event.usage
        self._note(b"f", event.at_s, event.request_id, event.reason.value)
        totals.finished[event.reason] = totals.finished.get(event.reason, 0) + 1
        totals.lives.add(event)
        longest_s = self._gaps.finished(event.request_id)
        slo = self._slos.pop(event.request_id, None)
        if event.first_admitted_s is not None:
            totals.queried_tokens += usage.prompt_tokens
        if event.reason not in COMPLETED or event.first_token_s is None or longest_s is None:
            return
        totals.prompt_tokens += usage.prompt_tokens
        totals.output_tokens += usage.output_tokens
        ttft_s, tpot_s = event.first_token_s - event.arrival_s, None
        totals.ttft_s.add(ttft_s)
        totals.e2e_s.add(event.at_s - event.arrival_s)
        if usage.output_tokens > 1:
            tpot_s = (event.at_s - event.first_token_s) / (usage.output_tokens - 1)
            totals.tpot_s.add(tpot_s)
            totals.longest_itl_s.add(longest_s)
        if slo is not None:
            kept = slo.ttft_s is None or ttft_s <= slo.ttft_s
            totals.good += kept and (slo.tpot_s is None or tpot_s is None or tpot_s <= slo.tpot_s)
