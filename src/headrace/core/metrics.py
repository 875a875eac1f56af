"""Folds events into counters and histograms, without a clock and without I/O. The gateway turns a snapshot into
Prometheus text under the names that vLLM made common, so that existing dashboards and autoscalers work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.core.events import (
    Admitted,
    Arrived,
    Decoded,
    Drew,
    Event,
    Finished,
    Lost,
    Preempted,
    Rejected,
    StepDone,
    Verified,
)
from headrace.core.step import Run
from headrace.core.types import RequestId

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_SLOW_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_COUNTS = tuple(float(2**power) for power in range(18))


@dataclass(slots=True)
class Histogram:
    """Counts per bucket (upper bounds inclusive, one more for the rest), as Prometheus wants them, and the sum."""

    help: str
    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def add_run(self, run: Run, times: int = 1) -> None:
        """`times` of each of the durations of a run. They are monotone, so each bucket gets a stretch of them."""
        done = 0
        while done < run.steps:
            left = run.after(done)
            at = bisect_left(self.bounds, left.first_s)
            stretch = self._stretch(left, at)
            self.counts[at] += stretch * times
            done += stretch
        self.sum += run.total_s * times

    def _stretch(self, run: Run, at: int) -> int:
        """How many durations from the first on fall into bucket `at`, which holds the first."""
        if not run.slope_s:
            return run.steps
        low, high = 1, run.steps
        while low < high:
            middle = (low + high + 1) // 2
            inside = bisect_left(self.bounds, run.first_s + (middle - 1) * run.slope_s) == at
            low, high = (middle, high) if inside else (low, middle - 1)
        return low

    def cumulative(self) -> Sequence[tuple[str, int]]:
        """(upper bound as Prometheus writes it, how many were at most that)."""
        total, rows = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, total))
        return rows


class Metrics:
    """An Observer that counts everything since the start. What is true now (queue, memory) is in `ports.Status`."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # of those, found
        self.drafts = 0  # requests that had tokens guessed, once for each step
        self.drafted_tokens = 0
        self.accepted_tokens = 0  # of these
        self.rejected = 0
        self.losses = 0  # of the executor
        self.finished: Counter[str] = Counter()
        self.histograms = {
            "time_to_first_token_seconds": Histogram("Arrival to first token.", _SLOW_S),
            "inter_token_latency_seconds": Histogram("Between consecutive tokens of one request.", _FAST_S),
            "request_time_per_output_token_seconds": Histogram("Mean after the first token, per request.", _FAST_S),
            "e2e_request_latency_seconds": Histogram("Arrival to last token.", _SLOW_S),
            "request_queue_time_seconds": Histogram("Arrival to first admission.", _SLOW_S),
            "request_prefill_time_seconds": Histogram("First admission to first token.", _SLOW_S),
            "request_decode_time_seconds": Histogram("First token to last token.", _SLOW_S),
            "request_inference_time_seconds": Histogram("First admission to last token.", _SLOW_S),
            "request_prompt_tokens": Histogram("Prompt tokens per request.", _COUNTS),
            "request_generation_tokens": Histogram("Output tokens per request.", _COUNTS),
            "request_max_num_generation_tokens": Histogram("Output tokens the request allowed.", _COUNTS),
            "request_num_preemptions": Histogram("Preemptions per request.", (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)),
            "iteration_tokens_total": Histogram("Tokens computed per step.", _COUNTS),
            "step_seconds": Histogram("Duration of one step.", _FAST_S),
        }
        self._prompts: dict[RequestId, int] = {}
        self._last_token_s: dict[RequestId, float] = {}

    def observe(self, event: Event) -> None:
        match event:
            case Decoded():
                self._decoded(event)
            case Drew():
                self._drew(event)
            case Verified():
                self.drafts += len(event.drafted)
                self.drafted_tokens += sum(event.drafted)
                self.accepted_tokens += sum(event.accepted)
            case StepDone():
                self.histograms["iteration_tokens_total"].add(event.tokens, event.run.steps)
                self.histograms["step_seconds"].add_run(event.run)
            case Arrived():
                self._prompts[event.request_id] = event.prompt_tokens
            case Admitted() if not event.again:
                self.prefix_queries += self._prompts.get(event.request_id, 0)
                self.prefix_hits += event.cached_tokens
                self.histograms["request_queue_time_seconds"].add(event.queue_s)
            case Preempted():
                self.preemptions += 1
            case Rejected():
                self.rejected += 1
            case Lost():
                self.losses += 1
            case Finished():
                self._finish(event)

    def _decoded(self, event: Decoded) -> None:
        """Requests that decode together share their gaps, so equal ones are counted before they are added."""
        self.output_tokens += event.requests * event.run.steps
        last_s = self._last_token_s
        drew = [request_id for request_id, _ in event.rows if request_id in last_s]
        later = event.run.after(1)
        first_s = event.at_s - later.total_s  # the end of the first repetition
        for before, times in Counter(map(last_s.__getitem__, drew)).items():
            self.histograms["inter_token_latency_seconds"].add(first_s - before, times)
        self.histograms["inter_token_latency_seconds"].add_run(later, len(drew))
        last_s.update(dict.fromkeys(drew, event.at_s))

    def _drew(self, event: Drew) -> None:
        self.output_tokens += sum(event.tokens)
        for request_id in event.first:
            self.prompt_tokens += self._prompts.get(request_id, 0)
        for request_id, tokens in zip(event.request_ids, event.tokens, strict=True):
            last = self._last_token_s.get(request_id)
            if last is not None:
                self.histograms["inter_token_latency_seconds"].add((event.at_s - last) / tokens, tokens)
        self._last_token_s.update(dict.fromkeys(event.request_ids, event.at_s))

    def _finish(self, event: Finished) -> None:
        self._prompts.pop(event.request_id, None)
        last = self._last_token_s.pop(event.request_id, None)
        self.finished[event.reason.value] += 1
        add = {name: histogram.add for name, histogram in self.histograms.items()}
        usage = event.usage
        add["request_prompt_tokens"](usage.prompt_tokens)
        add["request_generation_tokens"](usage.output_tokens)
        add["request_max_num_generation_tokens"](event.max_new_tokens)
        add["request_num_preemptions"](usage.preemptions)
        add["e2e_request_latency_seconds"](event.at_s - event.arrival_s)
        if event.first_token_s is None or event.first_admitted_s is None or last is None:
            return
        add["time_to_first_token_seconds"](event.first_token_s - event.arrival_s)
        add["request_prefill_time_seconds"](event.first_token_s - event.first_admitted_s)
        add["request_decode_time_seconds"](last - event.first_token_s)
        add["request_inference_time_seconds"](last - event.first_admitted_s)
        if usage.output_tokens > 1:
            per_token = (last - event.first_token_s) / (usage.output_tokens - 1)
            add["request_time_per_output_token_seconds"](per_token)
