"""Recordings of one replica's life as JSON lines: arrivals, aborts, plans with their digests, and what each step drew,
in the order in which the scheduler learned of them: of several lanes, each plan stands where it was made and each end
where it was told. `Recorder` writes one beside a live engine; `read` is bounded.

A recording is for checking decisions, not for publishing: it holds token ids, because the names of generated blocks
are hashes of them. Traces that may leave the house hold lengths and salted block keys only; see `headrace.workload`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, BinaryIO

import msgspec

from headrace.core import events
from headrace.core.clock import now
from headrace.core.config import EngineSettings
from headrace.core.events import Arrived, Event, Finished, Idle, Planned, StepDone
from headrace.core.ports import Capacity, Executor, ExecutorLost, Observer
from headrace.core.step import Run, StepPlan, StepResult
from headrace.core.types import Blank, FinishReason, HeadraceError, Request, RequestId, Sampling, Segment, Tokens

FORMAT = 3
LONGEST_LINE = 64 << 20  # bytes: a prompt of ten million tokens


Content = dict[str, list[list[Any]]]  # what a plan says, as lists


class BadRecording(HeadraceError):
    """A line that is not what this format says; the message names the line."""


class Head(msgspec.Struct, frozen=True, tag="head", forbid_unknown_fields=True):
    """What the scheduler was made of."""

    format: int
    settings: EngineSettings
    capacity: Capacity
    token_budget: int
    step_s: tuple[float, float] | None = None  # what a step takes, and a token of it, where policies go by that


class Arrive(msgspec.Struct, frozen=True, tag="arrive", forbid_unknown_fields=True):
    """A request was accepted at `at_s`: everything about it that a scheduler may look at."""

    at_s: float
    id: RequestId
    prompt: list[int | list[int]]  # segments: token ids, or how many tokens are blank
    arrival_s: float
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    block_keys: list[str] = []  # hexadecimal: they are wider than JSON's numbers
    salt: bytes = b""
    priority: int = 0
    tenant: str = ""
    deadline_s: float | None = None
    prompt_logprobs: int | None = None

    def request(self) -> Request:
        return Request(
            self.id,
            tuple(Blank(part) if isinstance(part, int) else Tokens(tuple(part)) for part in self.prompt),
            self.arrival_s,
            self.max_new_tokens,
            Sampling(prompt_logprobs=self.prompt_logprobs),
            self.stop_token_ids,
            tuple(int(key, 16) for key in self.block_keys),
            self.salt,
            self.priority,
            self.tenant,
            deadline_s=self.deadline_s,
        )


class Abort(msgspec.Struct, frozen=True, tag="abort", forbid_unknown_fields=True):
    """Somebody ended it; with several lanes, or its deadline."""

    at_s: float
    id: RequestId


class Plan(msgspec.Struct, frozen=True, tag="plan", forbid_unknown_fields=True):
    """A step began. `content` is `describe(plan)`, or null to save space."""

    at_s: float
    step: int
    digest: str
    content: Content | None = None
    lane: int = 0


class Rested(msgspec.Struct, frozen=True, tag="rested", forbid_unknown_fields=True):
    """A lane was to plan, and found nothing to do beside the others."""

    at_s: float
    lane: int


class Done(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """It ended, and drew these tokens."""

    at_s: float
    step: int
    drawn: dict[RequestId, tuple[int, ...]]


class Failed(msgspec.Struct, frozen=True, tag="failed", forbid_unknown_fields=True):
    at_s: float
    step: int
    error: str


class Lost(msgspec.Struct, frozen=True, tag="lost", forbid_unknown_fields=True):
    """The executor was gone, with every step that was under way; `begun`: one of them may have been the reason."""

    at_s: float
    reason: str
    begun: bool


Entry = Head | Arrive | Abort | Plan | Rested | Done | Failed | Lost


def describe(plan: StepPlan) -> Content:
    """Everything a plan says, as lists: one per row, per admission and per released request."""
    content: Content = {
        "work": [list(work) for work in plan.work],
        "admitted": [[one.request.id, one.output_ids, one.blocks, one.start] for one in plan.admitted],
        "released": [[request_id] for request_id in plan.released],
        "copies": [[copy.source_tier, copy.target_tier, copy.pairs] for copy in plan.copies],
    }
    if len(plan.lanes) > 1:
        content["lanes"] = [[lane.share, at == plan.lane] for at, lane in enumerate(plan.lanes)]
    return content


def digest(content: Content) -> str:
    """64 bits of a plan's content, the same in every process."""
    return blake2b(msgspec.json.encode(content), digest_size=8).hexdigest()


def arrive(at_s: float, request: Request) -> Arrive:
    return Arrive(
        at_s,
        request.id,
        [_segment(segment) for segment in request.prompt],
        request.arrival_s,
        request.max_new_tokens,
        request.stop_token_ids,
        [f"{key:x}" for key in request.block_keys],
        request.salt,
        request.priority,
        request.tenant,
        request.deadline_s,
        request.sampling.prompt_logprobs,
    )


def _segment(segment: Segment) -> int | list[int]:
    return segment.tokens if isinstance(segment, Blank) else list(segment.ids)


class Recorder:
    """An `Executor` around the real one and an `Observer` before another: between them they see everything that a
    scheduler decides upon. `write` gets one line after the other."""

    def __init__(
        self,
        executor: Executor,
        observer: Observer,
        write: Callable[[bytes], object],
        *,
        settings: EngineSettings,
        token_budget: int,
        contents: bool = True,
        step_s: tuple[float, float] | None = None,
    ) -> None:
        self._executor = executor
        self._observer = observer
        self._write = write
        self._contents = contents
        self._planned_s = 0.0
        self._drawn: dict[RequestId, tuple[int, ...]] = {}  # by the last step
        self._stops: dict[RequestId, frozenset[int]] = {}  # of the live requests
        self._several = settings.lanes != "one"
        self._put(Head(FORMAT, settings, executor.capacity, token_budget, step_s))

    @property
    def capacity(self) -> Capacity:
        return self._executor.capacity

    async def run(self, plan: StepPlan) -> StepResult:
        content = describe(plan)
        self._put(Plan(self._planned_s, plan.step, digest(content), content if self._contents else None, plan.lane))
        try:
            result = await self._executor.run(plan)
        except ExecutorLost:
            raise  # the scheduler says so, once for all lanes
        except Exception as error:
            self._put(Failed(now(), plan.step, str(error)))
            raise
        self._drawn = {request_id: sampled.token_ids for request_id, sampled in result.sampled.items()}
        return result

    def interrupt(self) -> Run | None:
        return self._executor.interrupt()

    async def close(self) -> None:
        await self._executor.close()

    def observe(self, event: Event) -> None:
        match event:
            case Planned():
                self._planned_s = event.at_s
            case events.Lost():
                self._put(Lost(event.at_s, event.reason, event.begun))
            case Idle():
                self._put(Rested(event.at_s, event.lane))
            case StepDone():
                self._put(Done(event.at_s, event.step, self._drawn))
            case Arrived() if event.request is not None:
                self._stops[event.request_id] = event.request.stop_token_ids
                self._put(arrive(event.at_s, event.request))
            case Finished():
                if self._from_outside(event):
                    self._put(Abort(event.at_s, event.request_id))
        self._observer.observe(event)

    def _from_outside(self, event: Finished) -> bool:
        """Whether somebody said so: the client, or the gateway that saw a stop string. Other ends follow from what was
        drawn and from the time, and will follow again."""
        stops = self._stops.pop(event.request_id, frozenset())
        if event.reason is FinishReason.STOP:
            return stops.isdisjoint(self._drawn.get(event.request_id, ()))
        return event.reason is FinishReason.ABORT or (self._several and event.reason is FinishReason.DEADLINE)

    def _put(self, entry: Entry) -> None:
        self._write(msgspec.json.encode(entry) + b"\n")


def read(stream: BinaryIO) -> Iterator[Entry]:
    """The entries of a recording, one line in memory at a time. Raises BadRecording."""
    decoder = msgspec.json.Decoder(Entry)
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise BadRecording(f"line {number} of the recording is longer than {LONGEST_LINE} bytes; is it one?")
        try:
            entry = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRecording(f"line {number} of the recording cannot be read: {error}; record it again") from error
        if isinstance(entry, Head) != (number == 1) or (isinstance(entry, Head) and entry.format != FORMAT):
            raise BadRecording(f"line {number}: a recording begins with one head of format {FORMAT}; record it again")
        yield entry
    if not number:
        raise BadRecording("the recording is empty; record it again")
