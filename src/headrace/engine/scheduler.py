"""Decides for one replica what each step computes, and is the sole mutator of its requests. A pure state machine: facts
and `now` in, plans and outputs out. Owns every request from `add` to its one finish; the blocks belong to `Memory`.

A request is two numbers, known and computed tokens, and computed catches up with known. Both move when a step is
planned; `commit` only appends the values that were drawn. Memory is taken for the tokens of one step, from those behind
in the ordering if need be: the first in the ordering can always go on, so everybody is first some day. With several
lanes there is one step in flight in each, and a request that one computes is left alone by the others; see `lanes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import repeat

from headrace.core import events
from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity, Observer
from headrace.core.step import Run, Sampled, StepPlan, StepResult, Work
from headrace.core.types import (
    BlockKey,
    FinishReason,
    HeadraceError,
    InvalidRequest,
    Output,
    Overloaded,
    Request,
    RequestId,
    TokenLogprob,
)
from headrace.engine.beats import by_order
from headrace.engine.draft import Drafting
from headrace.engine.lanes import EVERYBODY, Flights, Step
from headrace.engine.memory import Memory
from headrace.engine.planner import Planner
from headrace.engine.policy import Policies, choose
from headrace.engine.progress import Progress, State, check_servable
from headrace.engine.queue import Bounds, Deadlines, Lines
from headrace.engine.suspects import Suspects

_Drawn = tuple[list[tuple[int, ...]], list[int], list[tuple[TokenLogprob, ...]]]  # as drawn, the last token, logprobs
_Kept = dict[Progress, Sampled]  # by those who had drafts


_new_row = tuple.__new__  # map(_new_row, repeat(Output), zip(columns)) makes rows much faster than calling Output


class BadResult(HeadraceError):
    """The executor answered something else than it was asked."""


class _Told:
    """An observer after the policies that want to hear of everything first."""

    def __init__(self, listeners: Sequence[Callable[[events.Event], None]], then: Observer) -> None:
        self._listeners = (*listeners, then.observe)

    def observe(self, event: events.Event) -> None:
        for listener in self._listeners:
            listener(event)


class Scheduler:
    """`token_budget` may be changed between steps; policies with a budget of their own do so by themselves. Without
    `policies` it takes those that the settings name; raises HeadraceError for a name that is unknown."""

    def __init__(
        self,
        settings: EngineSettings,
        capacity: Capacity,
        *,
        token_budget: int,
        observer: Observer,
        policies: Policies | None = None,
    ) -> None:
        self.capacity = capacity
        self.token_budget = token_budget
        self.steps = 0
        self._policies = policies or choose(settings)
        self._settled = self._policies.settled
        if listeners := self._policies.listeners():
            observer = _Told(listeners, observer)
        self._observe = observer.observe
        blocks, host = (capacity.blocks, capacity.block_tokens), (capacity.host_blocks, capacity.least_copied_blocks)
        self._memory = Memory(*blocks, settings.prefix_cache, *host)
        self._lines = Lines(capacity.block_tokens)
        self._deadlines = Deadlines()
        self._bounds = Bounds(settings.max_queue_requests, settings.max_queue_tokens)
        self._drafting = Drafting(self._policies, self._lines, self._memory)
        shared = (self._lines, self._memory, self._drafting, self._bounds, observer)
        self._planner = Planner(self._policies, settings.max_running, capacity.layers, *shared)
        self._arrivals = 0
        if self._policies.shares is not None and capacity.host_blocks:
            raise HeadraceError("two lanes have no host tier: take --lanes one, or no --host-kv-memory")
        self._flights = Flights(self._policies.shares)  # planned, and neither committed nor failed
        self._suspects = Suspects(isolates=self.lanes == 1)

    # -- requests come and go ------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Requests that have not finished."""
        return len(self._lines.live)

    def live_ids(self) -> list[RequestId]:
        return list(self._lines.live)

    @property
    def lanes(self) -> int:
        return self._flights.lanes

    @property
    def running(self) -> int:
        return self._lines.running_count

    @property
    def waiting(self) -> int:
        return len(self._lines.waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of those who wait."""
        return self._lines.waiting_tokens

    @property
    def used_blocks(self) -> int:
        """Held by some request; cached blocks that nobody holds count as free."""
        return self._memory.pool.used

    @property
    def cached_blocks(self) -> int:
        """Held by no request, and not forgotten."""
        return self._memory.pool.cached

    def cached_tokens(self, keys: Sequence[BlockKey]) -> int:
        """Of a prompt with these keys, what is in the KV memory already."""
        return len(self._memory.index.match(keys, 0, len(keys))) * self.capacity.block_tokens

    def drain_s(self, now: float) -> float:
        """Seconds until everybody here has left, at the rate at which the last ones came to run."""
        return self._bounds.drain_s(self.live, self.waiting_tokens, now)

    def add(self, request: Request, now: float) -> None:
        """Take a request. Raises InvalidRequest if it can never be served, Overloaded if the queue is full."""
        try:
            check_servable(request, self.capacity)
            if request.id in self._lines.live or any(one.id == request.id for one in self._flights.leaving):
                raise InvalidRequest(f"a request with the id {request.id!r} is already here; use another id", "id")
            self._bounds.check_room(request.prompt_tokens, self.waiting, self.waiting_tokens, now)
        except (InvalidRequest, Overloaded) as error:
            self._observe(events.Rejected(now, request.id, str(error)))
            raise
        self._arrivals += 1
        progress = Progress(request, self.capacity.max_context_tokens, self._arrivals, now)
        progress.order = (self._policies.ordering(progress, now), progress.arrival_number)
        self._memory.enrol(progress)
        self._lines.enter(progress)
        self._deadlines.add(progress)
        self._observe(events.Arrived(now, request.id, progress.prompt_tokens, request.max_new_tokens, request))

    def abort(self, request_id: RequestId, now: float, reason: FinishReason = FinishReason.ABORT) -> Output | None:
        """End a request; None if it is unknown or has ended. Allowed while a step is in flight."""
        progress = self._lines.live.get(request_id)
        return None if progress is None else self._finish(progress, reason, now)

    def expire(self, now: float) -> list[Output]:
        """End every request whose deadline has come."""
        outputs = []
        while (due := self._deadlines.next(self.live)) and (due.request.deadline_s or 0.0) <= now:
            outputs.append(self._finish(due, FinishReason.DEADLINE, now))
        return outputs

    def next_deadline(self) -> float | None:
        """When `expire` has something to do, on the clock of `now`."""
        due = self._deadlines.next(self.live)
        return due.request.deadline_s if due else None

    # -- a step --------------------------------------------------------------------------------------------------------

    def plan(self, now: float, lane: int = 0) -> StepPlan | None:
        """What a lane does next; None if there is nothing. A plan without work only tells the executor whom to forget.
        Every plan must be answered by `commit` or `fail` before the next one of its lane."""
        flights = self._flights
        if flights.of(lane) is not None:
            raise RuntimeError("commit or fail the step in flight before planning another")
        if not self._lines.live and not self._lines.released:
            return None
        serves = flights.serves(lane)
        if flights.lanes > 1 and self._lines.live and self._planner.must_wait(serves):
            return None
        if not self._settled and self._planner.order_matters():
            self._policies.survey(tuple(self._lines.live.values()), now)
            self._lines.reorder(lambda progress: self._policies.ordering(progress, now))
        decoding = tuple(self._lines.decoding.members) if State.DECODING in serves else ()
        step = Step(self.steps, now, self.token_budget, decoding)
        if flights.lanes > 1:
            step.lane, step.serves, step.beside = lane, serves, flights.beside(lane)
        suspect = self._suspects.alone()
        if self._lines.live and (suspect is None or not self._planner.fill_alone(step, suspect)):
            self._planner.fill(step, self.capacity.steps if flights.lanes == 1 else 1)
        return self._seal(step)

    def commit(self, result: StepResult, now: float) -> list[Output]:
        """Append what a step drew. Raises BadResult, having changed nothing, if the result is of no step in flight or
        lacks a token; the step is then still in flight, for `fail`."""
        step = self._flights.steps.get(result.step)
        if step is None:
            raise BadResult(f"the executor answered step {result.step}, which is not in flight")
        run = result.run or Run(1, now - step.now)
        if not 1 <= run.steps <= step.steps:
            raise BadResult(f"the executor repeated the step {run.steps} times where {step.steps} were asked for")
        members, drawing = _without(step.members, step.left), _without(step.drawing, step.left)
        kept = _kept(step, result) if step.drafted else {}
        drawn = _drawn([*members, *drawing], kept, result) if result.others_drew is None else None
        self._went_by(step, run, now, len(members))
        if self._suspects:
            self._suspects.drew([*members, *drawing])
        self._flights.end(step)
        self._lines.decoding.pace.token = result.others_drew
        self._leave(step, [])
        joined = self._planner.join(step, self._flights.steps.values()) if step.serves is not EVERYBODY else []
        outputs = self._prompt_logprobs(step, result) if result.prompt_logprobs else []
        if step.drafted:
            self._drafting.settle(step.drafted, kept)
        if drawing:
            self._drew(step, drawing, kept, now)
        ended = self._lines.decoding.ended() if State.DECODING in step.serves else joined
        if drawn is None:
            return outputs + self._end(self._stopped(step, result), ended, now)
        for progress, sampled in kept.items():
            progress.output_ids += sampled.token_ids[:-1]
        outputs += self._append([*members, *drawing], drawn, ended, now)
        return outputs + self._refused(result, now) if result.failed else outputs

    def advance(self, run: Run) -> None:
        """The step in flight has been repeated like this, and the next repetition is in progress: what happens now
        happens in that one."""
        step = next(iter(self._flights.steps.values()), None)
        if step is None or run.steps >= step.steps:
            raise BadResult("the executor repeated a step that is not in flight, or too often")
        now = step.now + run.total_s
        self._went_by(step, run, now, len(step.members))
        self._planner.again()
        step.now = now
        step.steps -= run.steps

    def fail(self, now: float, error: str, lane: int = 0) -> list[Output]:
        """The step in flight failed: its requests end with this error, and what it should have computed is forgotten.
        The executor may know nobody any more but those in flight in other lanes, so all others who run start over from
        the cache."""
        step = self._flights.of(lane)
        if step is None:
            return []
        served = [*_without(step.members, step.left), *(progress for progress, _ in self._served(step))]
        outputs = [self._finish(progress, FinishReason.ERROR, now, error) for progress in served]
        self._flights.end(step)
        self._leave(step, step.fresh)
        self._memory.fail(step.fresh)
        for progress in self._lines.running():
            if self._flights.holder(progress) is None:
                if progress.served_step == step.number:  # what it was to go on with was being copied
                    progress.computed_tokens = 0
                self._planner.preempt(progress, now, "a step failed")
        return outputs

    @property
    def in_flight(self) -> bool:
        """Whether a step is planned, and neither committed nor failed."""
        return bool(self._flights.steps)

    def lost(self, now: float, reason: str, begun: bool = True) -> list[Output]:
        """The executor is gone, with all KV and everybody it knew. Whoever ran waits again, in its old place, and will
        go on from the tokens it has drawn; no step is in flight any more. If one had `begun` when it was lost, those
        whose fault that must be end with an error."""
        flights = list(self._flights.steps.values())
        self._observe(events.Lost(now, reason, begun and bool(flights)))
        served = [[*_without(step.members, step.left), *(one for one, _ in self._served(step))] for step in flights]
        for step in flights:
            self._flights.end(step)
        for progress in self._lines.running():
            drawing = progress.pace is not None and any(step.draws(progress) for step in flights)
            self._observe(events.Preempted(now, progress.id, progress.computed_tokens, "the executor was lost"))
            self._lines.move(progress, State.WAITING)
            progress.undraw(int(drawing))
            progress.preemptions += 1
            progress.queued_s = now
        self._lines.released.clear()
        self._memory.lose(self._lines.live.values())
        guilty = self._suspects.lost([one for some in served for one in some] if begun else [])
        error = f"the executor was lost each time it computed this request, the last time because {reason}"
        return [self._finish(progress, FinishReason.ERROR, now, error) for progress in guilty]

    def check(self) -> None:
        """Assert every invariant of the scheduler and of what it owns."""
        lines = self._lines
        lines.check()
        flights = self._flights.steps.values()
        self._suspects.check(lines.live.values())
        self._memory.check([*lines.live.values(), *self._flights.leaving])
        assert len({step.lane for step in flights}) == len(flights) <= self.lanes, "a lane has two steps in flight"
        drawing = {progress for step in flights for progress in step.drawing}
        for progress in lines.live.values():
            assert progress.computed_tokens < progress.known_tokens + (progress in drawing)
            assert progress.known_tokens <= progress.limit_tokens
            assert progress.computed_tokens + progress.pending_tokens <= progress.known_tokens
            assert (0 < progress.passed_layers < self.capacity.layers) == (progress.pending_tokens > 0)
            assert not progress.pending_tokens or progress.state is State.PREFILLING
            assert flights or len(progress.output_ids) <= progress.known_tokens - progress.prompt_tokens
            assert not (progress.state is State.WAITING and progress.blocks), "a waiting request holds blocks"

    def _seal(self, step: Step) -> StepPlan | None:
        released, self._lines.released = tuple(self._lines.released), []
        copies = self._memory.copies()
        if step.empty and not copies and (self._lines.live or not released):
            self._lines.released += released
            if self.lanes > 1:
                self._observe(events.Idle(step.now, step.lane))
            return None
        self.steps += 1
        lanes = self._flights.begin(step, self.used_blocks, self.capacity.blocks)
        rows, total = len(step.members) + len(step.others), self.capacity.blocks
        numbers = (rows, step.tokens, self.running, self.waiting, self.used_blocks, total)
        others = tuple(step.others)
        self._observe(events.Planned(step.now, step.number, *numbers, others, step.held, step.lane))
        return StepPlan(
            step.number,
            others,
            tuple(step.admitted),
            released,
            copies,
            lanes,
            step.lane,
            beat=step.beat,
            steps=step.steps,
            until_s=math.inf if (due := self.next_deadline()) is None else due,
        )

    # -- what became of it ---------------------------------------------------------------------------------------------

    def _served(self, step: Step) -> list[tuple[Progress, Work]]:
        """Those beside the beat who are still here. An id may have come back as another request meanwhile."""
        live = self._lines.live
        pairs = [(live[work.request_id], work) for work in step.others if work.request_id in live]
        return [pair for pair in pairs if pair[0].served_step == step.number]

    def _prompt_logprobs(self, step: Step, result: StepResult) -> list[Output]:
        """Logprobs of prompt positions as outputs of their own. A chunk from `start` on yields those of start + 1 and
        following; after a preemption, positions come again and are dropped."""
        outputs = []
        for progress, work in self._served(step):
            logprobs = result.prompt_logprobs.get(progress.id, ())[max(0, progress.logprobs_sent - work.start) :]
            if logprobs:
                progress.logprobs_sent += len(logprobs)
                outputs.append(Output(progress.id, prompt_logprobs=tuple(logprobs)))
        return outputs

    def _refused(self, result: StepResult, now: float) -> list[Output]:
        """End those who cannot go on after this step."""
        here = [(self._lines.live[name], why) for name, why in result.failed.items() if name in self._lines.live]
        return [self._finish(progress, FinishReason.INVALID, now, why) for progress, why in here]

    def _went_by(self, step: Step, run: Run, now: float, drew: int) -> None:
        used_block_s = self._planner.repeat(run)
        self._observe(events.StepDone(now, step.number, run.total_s, step.tokens, run, self.used_blocks, used_block_s))
        if step.beat is not None:
            self._observe(events.Decoded(now, step.beat.rows, (*step.beat.paused, *step.joined), drew, run))

    def _drew(self, step: Step, drawing: Sequence[Progress], kept: _Kept, now: float) -> None:
        first = _without(step.first, step.left)
        for progress in first:
            progress.first_token_s = now
        ids = tuple(progress.id for progress in drawing)
        tokens = tuple(len(kept[one].token_ids) if one in kept else 1 for one in drawing) if kept else (1,) * len(ids)
        self._observe(events.Drew(now, ids, tokens, tuple(progress.id for progress in first)))
        if kept:
            drafted = tuple(len(step.drafted[progress]) for progress in kept)
            accepted = tuple(len(sampled.token_ids) - 1 for sampled in kept.values())
            self._observe(events.Verified(now, tuple(progress.id for progress in kept), drafted, accepted))

    def _append(self, drawing: Sequence[Progress], drawn: _Drawn, ended: list[Progress], now: float) -> list[Output]:
        """Append the drawn tokens to their requests, and end those that are through."""
        token_ids, tokens, logprobs = drawn
        ids = [progress.id for progress in drawing]
        columns = zip(ids, token_ids, logprobs, repeat(()), repeat(None), repeat(None), repeat(None))
        outputs: list[Output] = list(map(_new_row, repeat(Output), columns))
        stopped: list[Progress] = []
        for progress, token in zip(drawing, tokens, strict=True):
            progress.output_ids.append(token)
            if token in progress.stop_token_ids:
                stopped.append(progress)
        for end in self._end(stopped, ended, now):
            at = ids.index(end.request_id)
            outputs[at] = outputs[at]._replace(finish=end.finish, usage=end.usage)
        return outputs

    def _stopped(self, step: Step, result: StepResult) -> list[Progress]:
        """Who drew a stop token, if all others drew the same: then there is an output for those who end only."""
        stopped = []
        for request_id, sampled in result.sampled.items():
            progress = self._lines.live.get(request_id)
            if progress is not None and step.served(progress) and sampled.token_ids[-1] in progress.stop_token_ids:
                stopped.append(progress)
        return stopped

    def _end(self, stopped: list[Progress], ended: list[Progress], now: float) -> list[Output]:
        """End those who stopped and those who reached their length, in order."""
        if not (stopped or ended):
            return []
        reasons = dict.fromkeys(ended, FinishReason.LENGTH)
        reasons |= dict.fromkeys(stopped, FinishReason.STOP)
        return [self._finish(progress, reasons[progress], now) for progress in sorted(reasons, key=by_order)]

    def _finish(self, progress: Progress, reason: FinishReason, now: float, error: str | None = None) -> Output:
        """The one end of a request: its blocks go back, and the executor is told to forget it if it knew it."""
        holder, counted = self._flights.holder(progress), progress.pace is not None
        self._lines.move(progress, State.FINISHED)
        self._suspects.left(progress)
        for step in self._flights.steps.values():
            step.left.append(progress)
            progress.output_tokens -= counted and step.draws(progress)
        if holder is not None:
            self._lines.released.pop()
            holder.leaving.append(progress)
        elif self.lanes > 1:
            self._memory.release(progress, [])
        else:
            self._memory.release(progress, next((step.fresh for step in self._flights.steps.values()), []))
        request, usage = progress.request, progress.usage()
        times = (request.arrival_s, progress.first_admitted_s, progress.first_token_s)
        self._observe(events.Finished(now, progress.id, reason, usage, *times, request.max_new_tokens))
        return Output(progress.id, finish=reason, usage=usage, error=error)

    def _leave(self, step: Step, fresh: list[BlockKey]) -> None:
        """It is over: who ended meanwhile needs its blocks no more."""
        for progress in step.leaving:
            self._lines.released.append(progress.id)
            self._memory.release(progress, fresh)


def _without(some: Sequence[Progress], left: Sequence[Progress]) -> Sequence[Progress]:
    return [progress for progress in some if progress not in left] if left else some


def _drawn(some: Sequence[Progress], kept: _Kept, result: StepResult) -> _Drawn:
    """What each of them drew: exactly one token, but for those in `kept`."""
    sampled = result.sampled
    try:
        drawn = [sampled[progress.id] for progress in some]
        if kept:
            drawn = [kept.get(progress, one) for progress, one in zip(some, drawn, strict=True)]
        token_ids = last = [one.token_ids for one in drawn]
        if kept:
            last = [ids[-1:] if progress in kept else ids for progress, ids in zip(some, token_ids, strict=True)]
        return token_ids, [token for (token,) in last], [one.logprobs for one in drawn]
    except KeyError as error:
        raise BadResult(f"the executor drew no token for request {error}") from error
    except ValueError as error:
        raise BadResult("the executor drew several tokens, or none, where one was asked for") from error


def _kept(step: Step, result: StepResult) -> _Kept:
    """What those with drafts drew, up to the first stop token: what comes after it is nobody's."""
    kept: _Kept = {}
    for progress, drafts in step.drafted.items():
        if progress in step.left:
            continue
        sampled = result.sampled.get(progress.id)
        if sampled is None:
            if result.others_drew is None:
                raise BadResult(f"the executor drew no token for request {progress.id!r}")
            sampled = Sampled((result.others_drew,))
        ids, stops = sampled.token_ids, progress.stop_token_ids
        if not ids or ids[:-1] != drafts[: len(ids) - 1]:
            raise BadResult(f"the executor accepted drafts that request {progress.id!r} does not have")
        end = next((at for at, token in enumerate(ids, 1) if token in stops), len(ids))
        kept[progress] = sampled if end == len(ids) else Sampled(ids[:end], sampled.logprobs[:end])
    return kept
