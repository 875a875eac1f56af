"""Decides for one replica what each step computes, and is the sole mutator of its requests. A pure state machine: facts
and `now` in, plans and outputs out. Owns every request from `add` to its one finish; the blocks belong to `Memory`.

A request is two numbers, known and computed tokens, and computed catches up with known. Both move when a step is
planned; `commit` only appends the values that were drawn. Memory is taken for the tokens of one step, from those behind
in the ordering if need be: the first in the ordering can always go on, so everybody is first some day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat

from headrace.core import events
from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity, Observer
from headrace.core.step import Admitted, Block, StepPlan, StepResult, Work
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
from headrace.engine import policy
from headrace.engine.memory import Memory
from headrace.engine.policy import Admission, BatchFormer, BatchView, Ordering, PoolView, Preemption, Share
from headrace.engine.progress import Progress, State, check_servable
from headrace.engine.queue import Bounds, Deadlines, Lines

_new = tuple.__new__  # map(_new, repeat(Work), zip(columns)) makes rows ten times faster than calling Work does


_Drawn = tuple[list[tuple[int, ...]], list[int], list[tuple[TokenLogprob, ...]]]  # as drawn, the token, logprobs


class BadResult(HeadraceError):
    """The executor answered something else than it was asked."""


@dataclass(slots=True)
class _Step:
    """One step while it is planned, and then until it is committed."""

    number: int
    now: float
    decoding: tuple[Progress, ...]
    work: list[Work] = field(default_factory=list)
    drawing: list[Progress] = field(default_factory=list)  # whose work samples
    first: list[Progress] = field(default_factory=list)  # of these, who draw for the first time
    admitted: list[Admitted] = field(default_factory=list)
    fresh: list[BlockKey] = field(default_factory=list)  # named in this step: true only if it succeeds
    tokens: int = 0
    preempted: bool = False

    def leave(self, progress: Progress) -> None:
        """A request ended while the step ran: whatever it draws is nobody's."""
        for some in (self.drawing, self.first):
            if progress in some:
                some.remove(progress)


class Scheduler:
    """`token_budget` may be changed between steps. Policies left out are those the settings name; raises HeadraceError
    for a name that is unknown."""

    def __init__(
        self,
        settings: EngineSettings,
        capacity: Capacity,
        *,
        token_budget: int,
        observer: Observer,
        ordering: Ordering | None = None,
        admission: Admission | None = None,
        batch: BatchFormer | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        self.capacity = capacity
        self.token_budget = token_budget
        self.steps = 0
        self._max_running = settings.max_running
        self._block_tokens = capacity.block_tokens
        self._observe = observer.observe
        self._ordering = ordering or policy.named(policy.ORDERINGS, settings.ordering, "ordering")
        self._admission = admission or policy.named(policy.ADMISSIONS, settings.admission, "admission")
        self._batch = batch or policy.named(policy.BATCHES, settings.batch, "batch")
        self._preemption = preemption or policy.named(policy.PREEMPTIONS, settings.preemption, "preemption")
        self._memory = Memory(capacity.blocks, capacity.block_tokens, settings.prefix_cache)
        self._lines = Lines()
        self._deadlines = Deadlines()
        self._bounds = Bounds(settings.max_queue_requests, settings.max_queue_tokens)
        self._arrivals = 0
        self._reserved_blocks = 0  # what the running would hold at their longest
        self._released: list[RequestId] = []  # for the next plan
        self._flight: _Step | None = None
        self._first_is_stuck = False  # the first in the ordering found no block: next time it goes before all others

    # -- requests come and go ------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Requests that have not finished."""
        return len(self._lines.live)

    @property
    def running(self) -> int:
        return len(self._lines.prefilling) + len(self._lines.decoding)

    @property
    def waiting(self) -> int:
        return len(self._lines.waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of those who wait."""
        return self._bounds.waiting_tokens

    @property
    def used_blocks(self) -> int:
        """Held by some request; cached blocks that nobody holds count as free."""
        return self._memory.pool.used

    def add(self, request: Request, now: float) -> None:
        """Take a request. Raises InvalidRequest if it can never be served, Overloaded if the queue is full."""
        try:
            check_servable(request, self.capacity)
            if request.id in self._lines.live:
                raise InvalidRequest(f"a request with the id {request.id!r} is already here; use another id", "id")
            self._bounds.check_room(request, self.waiting, now)
        except (InvalidRequest, Overloaded) as error:
            self._observe(events.Rejected(now, request.id, str(error)))
            raise
        self._arrivals += 1
        progress = Progress(request, self.capacity.max_context_tokens, self._arrivals, now)
        progress.order = (self._ordering(progress, now), progress.arrival_number)
        self._memory.enrol(progress)
        self._lines.enter(progress)
        self._bounds.waiting_tokens += progress.prompt_tokens
        self._deadlines.add(progress)
        self._observe(events.Arrived(now, request.id, progress.prompt_tokens, request.max_new_tokens))

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

    def plan(self, now: float) -> StepPlan | None:
        """What to do next; None if there is nothing. A plan without work only tells the executor whom to forget.
        Every plan must be answered by `commit` or `fail` before the next one."""
        if self._flight is not None:
            raise RuntimeError("commit or fail the step in flight before planning another")
        if not self._lines.live and not self._released:
            return None
        if self._ordering not in policy.SETTLED:
            self._lines.reorder(lambda progress: self._ordering(progress, now))
        step = _Step(self.steps, now, tuple(self._lines.decoding.members))
        if self._lines.live:
            self._fill(step)
        return self._seal(step)

    def commit(self, result: StepResult, now: float) -> list[Output]:
        """Append what the step drew. Raises BadResult, having changed nothing, if the result is not of this step or
        lacks a token; the step is then still in flight, for `fail`."""
        step = self._flight
        if step is None or step.number != result.step:
            raise BadResult(f"the executor answered step {result.step}, which is not in flight")
        ids = [progress.id for progress in step.drawing]
        drawn = _drawn(ids, result)
        self._flight = None
        self._observe(events.StepDone(now, step.number, now - step.now, step.tokens))
        outputs = self._prompt_logprobs(step, result) if result.prompt_logprobs else []
        if ids:
            outputs += self._draw(step, ids, drawn, now)
        return outputs

    def fail(self, now: float, error: Exception | str) -> list[Output]:
        """The step in flight failed: its requests end with an error, and what it promised to compute is forgotten. The
        executor knows nobody any more, so those who were running beside the step start over, from the cache."""
        step = self._flight
        if step is None:
            return []
        message = f"the step failed: {error}"
        served = self._served(step)
        outputs = [self._finish(progress, FinishReason.ERROR, now, message) for progress, _ in served]
        self._memory.forget(step.fresh)
        self._flight = None
        self._first_is_stuck = False
        for progress in self._lines.running():
            self._preempt(progress, now, "a step failed")
        self._released.clear()
        return outputs

    def check(self) -> None:
        """Assert every invariant of the scheduler and of what it owns."""
        lines = self._lines
        lines.check()
        self._memory.check(lines.live.values())
        assert self.waiting_tokens == sum(progress.prompt_tokens for progress in lines.waiting.members)
        assert self._reserved_blocks == sum(map(self._longest_blocks, lines.running()))
        for progress in lines.live.values():
            assert progress.computed_tokens < progress.known_tokens <= progress.limit_tokens
            assert self._flight or progress.known_tokens == progress.prompt_tokens + len(progress.output_ids)
            assert not (progress.state is State.WAITING and progress.blocks), "a waiting request holds blocks"

    # -- planning ------------------------------------------------------------------------------------------------------

    def _fill(self, step: _Step) -> None:
        """Let the batch policy name its wishes, and grant what is possible. Whatever it wishes, the first in the
        ordering is not stuck twice in a row, and somebody is served."""
        if self._first_is_stuck:
            self._serve_first(step)
        lines = self._lines
        prefilling, waiting = tuple(lines.prefilling.members), tuple(lines.waiting.members)
        wishes = self._batch(BatchView(step.now, self.token_budget, step.decoding, prefilling, waiting))
        share = next(wishes, None)
        while share is not None:
            granted = self._grant(share, step)
            try:
                share = wishes.send(granted)
            except StopIteration:
                share = None
        if not step.work:
            self._serve_first(step)

    def _serve_first(self, step: _Step) -> None:
        self._first_is_stuck = False
        first = (self._lines.running() or self._lines.waiting.members)[0]
        self._serve(first, max(1, self.token_budget - len(step.decoding)), False, step)

    def _grant(self, share: Share, step: _Step) -> int:
        if share.requests is step.decoding and share.tokens >= len(step.decoding):
            return self._decode(step)
        left = share.tokens
        for view in share.requests:
            if left <= 0:
                break
            progress = self._lines.live[view.request.id]
            if progress.served_step == step.number:
                continue
            was_waiting = progress.state is State.WAITING
            granted = self._serve(progress, left, share.whole, step)
            if was_waiting and not granted:
                break
            left -= granted
        return share.tokens - left

    def _serve(self, progress: Progress, most: int, whole: bool, step: _Step) -> int:
        """Give one request up to `most` tokens of work, admitting it if it waits. Returns how many it got."""
        memory, waiting = self._memory, progress.state is State.WAITING
        hits, start = memory.match(progress), progress.computed_tokens
        if hits:
            start = (start // self._block_tokens + len(hits)) * self._block_tokens
        tokens = progress.known_tokens - start
        if tokens > most:
            if whole and step.work:
                return 0
            tokens = tokens if whole else most
        own = 0 if start % self._block_tokens else 1
        if not (self._may_start(progress, hits, own, step) if waiting else self._make_room(progress, hits, own, step)):
            return 0
        replaced = memory.adopt(progress, hits)
        if waiting:
            self._admit(progress, step)
        adopted = () if waiting else tuple(hits[len(replaced) :])
        tokens = min(tokens, memory.reachable_tokens(progress) - start)
        new_blocks = adopted + memory.grow(progress, start + tokens)
        self._advance(progress, start, tokens, new_blocks, replaced, step)
        return tokens

    def _may_start(self, progress: Progress, hits: Sequence[Block], own: int, step: _Step) -> bool:
        """Whether a waiting request is admitted now. Nobody takes what a request preempted in this step gave back, and
        an empty replica takes the first whatever the policy says."""
        if step.preempted:
            return False
        if not self.running:
            return True
        if self.running >= min(self._max_running, self.token_budget):
            return False
        adopted = self._memory.cost(hits)
        pool = self._pool_view()
        if adopted + own > pool.free_blocks:
            return False
        progress.cached_blocks = len(hits) - adopted
        return self._admission(progress, pool)

    def _pool_view(self) -> PoolView:
        blocks_for, prefilling = self._memory.blocks_for, self._lines.prefilling.members
        return PoolView(
            total_blocks=self.capacity.blocks,
            free_blocks=self._memory.pool.free,
            block_tokens=self._block_tokens,
            promised_blocks=sum(blocks_for(one.known_tokens) - len(one.blocks) for one in prefilling),
            reserved_blocks=self._reserved_blocks,
            running=self._lines.decoding.members + prefilling,
        )

    def _admit(self, progress: Progress, step: _Step) -> None:
        """From here on the executor knows the request; its blocks so far all come from the cache."""
        now, cached_tokens, again = step.now, progress.computed_tokens, progress.first_admitted_s is not None
        if not again:
            progress.first_admitted_s = now
            progress.cached_tokens = cached_tokens
        progress.cached_blocks = 0
        self._move(progress, State.PREFILLING)
        self._bounds.left(progress, now)
        step.admitted.append(
            Admitted(progress.request, tuple(progress.output_ids), tuple(progress.blocks), cached_tokens)
        )
        self._observe(events.Admitted(now, progress.id, cached_tokens, now - progress.queued_s, again))

    def _advance(
        self,
        progress: Progress,
        start: int,
        tokens: int,
        new_blocks: tuple[Block, ...],
        replaced: tuple[tuple[int, Block], ...],
        step: _Step,
    ) -> None:
        """Put work into the step: the numbers move now."""
        sample = start + tokens == progress.known_tokens
        progress.computed_tokens = start + tokens
        if sample:
            step.drawing.append(progress)
            if not progress.output_ids:
                step.first.append(progress)
            if progress.state is State.PREFILLING:
                self._move(progress, State.DECODING)
        progress.served_step = step.number
        self._memory.name(progress, step.fresh)
        step.work.append(Work(progress.id, start, tokens, sample, new_blocks, replaced))
        step.tokens += tokens

    def _decode(self, step: _Step) -> int:
        """`_serve` for all that are one token behind, without what cannot happen to them and column by column: in most
        steps they are nearly all there is to do. Every `block_tokens`-th step of a request begins a block."""
        number, size, memory = step.number, self._block_tokens, self._memory
        ready: Sequence[Progress] = step.decoding
        some_wait = bool(step.work)
        starts = [progress.computed_tokens for progress in ready]
        blocks: list[tuple[Block, ...]] = [()] * len(ready)
        for at in [at for at, start in enumerate(starts) if not start % size]:
            progress = ready[at]
            if progress.served_step == number:
                continue
            if memory.pool.free or self._make_room(progress, (), 1, step):
                blocks[at] = memory.grow(progress, starts[at] + 1)
            else:
                progress.served_step, some_wait = number, True  # it has had its turn
        if some_wait or step.preempted:
            chosen = [progress.served_step != number for progress in ready]
            ready, starts = list(compress(ready, chosen)), list(compress(starts, chosen))
            blocks = list(compress(blocks, chosen))
        ids = [progress.id for progress in ready]
        columns = zip(ids, starts, repeat(1), repeat(True), blocks, repeat(()), repeat(None), repeat(0))
        step.work += map(_new, repeat(Work), columns)
        for progress in ready:
            progress.computed_tokens += 1
            progress.served_step = number
        step.drawing += ready
        step.tokens += len(ready)
        return len(ready)

    def _make_room(self, progress: Progress, hits: Sequence[Block], own: int, step: _Step) -> bool:
        """See that `hits` can be adopted and `own` blocks taken, if need be by preempting requests behind this one that
        this step has not served. Otherwise it keeps what it has and waits for its turn."""
        memory = self._memory
        while memory.pool.free < own + memory.cost(hits):
            running = self._lines.running()
            behind = [other for other in running if other.order > progress.order and other.served_step != step.number]
            if not behind:
                self._first_is_stuck |= progress is running[0]
                return False
            victim = self._lines.live[self._preemption(behind, progress).request.id]
            victim.served_step = step.number
            step.preempted = True
            self._preempt(victim, step.now, "memory")
        return True

    def _seal(self, step: _Step) -> StepPlan | None:
        released, self._released = tuple(self._released), []
        if not step.work and not released:
            return None
        self.steps += 1
        self._flight = step
        total = self.capacity.blocks
        numbers = (len(step.work), step.tokens, self.running, self.waiting, self.used_blocks, total)
        self._observe(events.Planned(step.now, step.number, *numbers))
        return StepPlan(step.number, tuple(step.work), tuple(step.admitted), released)

    # -- what became of it ---------------------------------------------------------------------------------------------

    def _served(self, step: _Step) -> list[tuple[Progress, Work]]:
        """Those of a step who are still here. An id may have come back as another request meanwhile."""
        live = self._lines.live
        pairs = [(live[work.request_id], work) for work in step.work if work.request_id in live]
        return [pair for pair in pairs if pair[0].served_step == step.number]

    def _prompt_logprobs(self, step: _Step, result: StepResult) -> list[Output]:
        """Logprobs of prompt positions as outputs of their own. A chunk from `start` on yields those of start + 1 and
        following; after a preemption, positions come again and are dropped."""
        outputs = []
        for progress, work in self._served(step):
            logprobs = result.prompt_logprobs.get(progress.id, ())[max(0, progress.logprobs_sent - work.start) :]
            if logprobs:
                progress.logprobs_sent += len(logprobs)
                outputs.append(Output(progress.id, prompt_logprobs=tuple(logprobs)))
        return outputs

    def _draw(self, step: _Step, ids: list[RequestId], drawn: _Drawn, now: float) -> list[Output]:
        """Append the drawn tokens to their requests, and end those that are through."""
        token_ids, tokens, logprobs = drawn
        columns = zip(ids, token_ids, logprobs, repeat(()), repeat(None), repeat(None), repeat(None))
        outputs: list[Output] = list(map(_new, repeat(Output), columns))
        ended: list[Progress] = []
        for progress, token in zip(step.drawing, tokens, strict=True):
            progress.output_ids.append(token)
            if token in progress.stop_token_ids or progress.computed_tokens == progress.last_tokens:
                ended.append(progress)
        for progress in step.first:
            progress.first_token_s = now
        first = tuple(progress.id for progress in step.first)
        self._observe(events.Drew(now, tuple(ids), (1,) * len(ids), first))
        for progress in ended:
            stopped = progress.output_ids[-1] in progress.stop_token_ids
            end = self._finish(progress, FinishReason.STOP if stopped else FinishReason.LENGTH, now)
            at = ids.index(progress.id)
            outputs[at] = outputs[at]._replace(finish=end.finish, usage=end.usage)
        return outputs

    def _finish(self, progress: Progress, reason: FinishReason, now: float, error: str | None = None) -> Output:
        """The one end of a request: its blocks go back, and the executor is told to forget it if it knew it."""
        flight = self._flight
        self._memory.release(progress, flight.fresh if flight else [])
        if progress.state is not State.WAITING:
            self._released.append(progress.id)
        self._move(progress, State.FINISHED)
        if flight:
            flight.leave(progress)
        request, usage = progress.request, progress.usage()
        times = (request.arrival_s, progress.first_admitted_s, progress.first_token_s)
        self._observe(events.Finished(now, progress.id, reason, usage, *times, request.max_new_tokens))
        return Output(progress.id, finish=reason, usage=usage, error=error)

    def _preempt(self, progress: Progress, now: float, reason: str) -> None:
        """Back to waiting, to its old place in the ordering; its blocks stay cached as long as nobody needs them."""
        self._observe(events.Preempted(now, progress.id, progress.computed_tokens, reason))
        self._memory.release(progress, [])
        self._move(progress, State.WAITING)
        self._released.append(progress.id)
        progress.preemptions += 1
        progress.queued_s = now

    def _move(self, progress: Progress, state: State) -> None:
        """Change state, and the sums that depend on it."""
        was_waiting, was_running = progress.state is State.WAITING, progress.running
        self._lines.move(progress, state)
        self._bounds.waiting_tokens += progress.prompt_tokens * ((state is State.WAITING) - was_waiting)
        self._reserved_blocks += self._longest_blocks(progress) * (progress.running - was_running)

    def _longest_blocks(self, progress: Progress) -> int:
        return self._memory.blocks_for(progress.last_tokens)


def _drawn(ids: Sequence[RequestId], result: StepResult) -> _Drawn:
    """What each of them drew: exactly one token, for a plan without drafts cannot yield more."""
    sampled = result.sampled
    try:
        drawn = [sampled[request_id] for request_id in ids]
        token_ids = [one.token_ids for one in drawn]
        return token_ids, [token for (token,) in token_ids], [one.logprobs for one in drawn]
    except KeyError as error:
        raise BadResult(f"the executor drew no token for request {error}") from error
    except ValueError as error:
        raise BadResult("the executor drew several tokens, or none, where one was asked for") from error
