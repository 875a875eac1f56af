"""Fills one step: lets the policies wish, grants what memory and order allow, and moves the requests it serves. The
planning half of the scheduler, which owns it; keeps nothing from step to step but who was left without memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat

from headrace.core import events
from headrace.core.ports import Observer
from headrace.core.step import Admitted, Block, Work
from headrace.core.types import BlockKey
from headrace.engine.memory import Memory
from headrace.engine.policy import BatchView, Policies, PoolView, Share
from headrace.engine.progress import Progress, State
from headrace.engine.queue import Bounds, Lines

new_row = tuple.__new__  # map(new_row, repeat(Work), zip(columns)) makes rows much faster than calling Work does


@dataclass(slots=True)
class Step:
    """One step while it is planned, and then until it is committed."""

    number: int
    now: float
    token_budget: int
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


class Planner:
    """Moves requests through `lines` and blocks through `memory`, as one step after the other needs it."""

    def __init__(
        self, policies: Policies, max_running: int, lines: Lines, memory: Memory, bounds: Bounds, observer: Observer
    ) -> None:
        self._policies = policies
        self._max_running = max_running
        self._lines = lines
        self._memory = memory
        self._bounds = bounds
        self._observe = observer.observe
        self._block_tokens = memory.block_tokens
        self._first_is_stuck = False  # the first in the ordering found no block: next time it goes before all others

    def fill(self, step: Step) -> None:
        """Let the batch policy name its wishes, and grant what is possible. Whatever it wishes, the first in the
        ordering is not stuck twice in a row, and somebody is served."""
        if self._first_is_stuck:
            self._serve_first(step)
        lines = self._lines
        prefilling, waiting = tuple(lines.prefilling.members), tuple(lines.waiting.members)
        wishes = self._policies.batch(BatchView(step.now, step.token_budget, step.decoding, prefilling, waiting))
        share = next(wishes, None)
        while share is not None:
            granted = self._grant(share, step)
            try:
                share = wishes.send(granted)
            except StopIteration:
                share = None
        if not step.work:
            self._serve_first(step)
        assert step.work, "nobody was served although somebody is here"

    def _serve_first(self, step: Step) -> None:
        self._first_is_stuck = False
        first = (self._lines.running() or self._lines.waiting.members)[0]
        self._serve(first, max(1, step.token_budget - len(step.decoding)), False, step)

    def _grant(self, share: Share, step: Step) -> int:
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

    def _serve(self, progress: Progress, most: int, whole: bool, step: Step) -> int:
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

    def _may_start(self, progress: Progress, hits: Sequence[Block], own: int, step: Step) -> bool:
        """Whether a waiting request is admitted now. Nobody takes what a request preempted in this step gave back, and
        an empty replica takes the first whatever the policy says."""
        if step.preempted:
            return False
        if not self._lines.running_count:
            return True
        if self._lines.running_count >= self._max_running:
            return False
        adopted = self._memory.cost(hits)
        pool = self._pool_view()
        if adopted + own > pool.free_blocks:
            return False
        progress.cached_blocks = len(hits) - adopted
        return self._policies.admission(progress, pool)

    def _pool_view(self) -> PoolView:
        blocks_for, prefilling = self._memory.blocks_for, self._lines.prefilling.members
        return PoolView(
            total_blocks=self._memory.pool.blocks,
            free_blocks=self._memory.pool.free,
            block_tokens=self._block_tokens,
            promised_blocks=sum(blocks_for(one.known_tokens) - len(one.blocks) for one in prefilling),
            reserved_blocks=self._lines.reserved_blocks,
            running=self._lines.decoding.members + prefilling,
        )

    def _admit(self, progress: Progress, step: Step) -> None:
        """From here on the executor knows the request; its blocks so far all come from the cache."""
        now, cached_tokens, again = step.now, progress.computed_tokens, progress.first_admitted_s is not None
        if not again:
            progress.first_admitted_s = now
            progress.cached_tokens = cached_tokens
        progress.cached_blocks = 0
        self._lines.move(progress, State.PREFILLING)
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
        step: Step,
    ) -> None:
        """Put work into the step: the numbers move now."""
        sample = start + tokens == progress.known_tokens
        progress.computed_tokens = start + tokens
        if sample:
            step.drawing.append(progress)
            if not progress.output_ids:
                step.first.append(progress)
            if progress.state is State.PREFILLING:
                self._lines.move(progress, State.DECODING)
        progress.served_step = step.number
        self._memory.name(progress, step.fresh)
        step.work.append(Work(progress.id, start, tokens, sample, new_blocks, replaced))
        step.tokens += tokens

    def _decode(self, step: Step) -> int:
        """`_serve` for all that are one token behind, without what cannot happen to them and column by column: in most
        steps they are nearly all there is to do. Every `block_tokens`-th step of a request begins a block."""
        number, size, memory = step.number, self._block_tokens, self._memory
        ready: Sequence[Progress] = step.decoding
        some_wait = bool(step.work)  # served already, or stuck for want of a block
        starts = [progress.computed_tokens for progress in ready]
        blocks: list[tuple[Block, ...]] = [()] * len(ready)
        for at in [at for at, start in enumerate(starts) if not start % size]:
            progress = ready[at]
            if progress.served_step == number:
                continue
            if memory.pool.free or self._make_room(progress, (), 1, step):
                blocks[at] = memory.grow(progress, starts[at] + 1)
            else:
                some_wait = True
        if some_wait or step.preempted:
            rows = zip(ready, starts, blocks, strict=True)
            chosen = [one.served_step != number and (start % size or block) for one, start, block in rows]
            ready, starts = list(compress(ready, chosen)), list(compress(starts, chosen))
            blocks = list(compress(blocks, chosen))
        ids = [progress.id for progress in ready]
        columns = zip(ids, starts, repeat(1), repeat(True), blocks, repeat(()), repeat(None), repeat(0))
        step.work += map(new_row, repeat(Work), columns)
        for progress in ready:
            progress.computed_tokens += 1
            progress.served_step = number
        step.drawing += ready
        step.tokens += len(ready)
        return len(ready)

    def _make_room(self, progress: Progress, hits: Sequence[Block], own: int, step: Step) -> bool:
        """See that `hits` can be adopted and `own` blocks taken, if need be by preempting requests behind this one that
        this step has not served. Otherwise it keeps what it has and waits for its turn."""
        memory = self._memory
        while memory.pool.free < own + memory.cost(hits):
            running = self._lines.running()
            behind = [other for other in running if other.order > progress.order and other.served_step != step.number]
            if not behind:
                self._first_is_stuck |= progress is running[0]
                return False
            chosen = self._policies.preemption(behind, progress)
            victim = next((other for other in behind if other is chosen), behind[-1])
            victim.served_step = step.number
            step.preempted = True
            self.preempt(victim, step.now, "memory")
        return True

    def preempt(self, progress: Progress, now: float, reason: str) -> None:
        """Back to waiting, to its old place in the ordering; its blocks stay cached as long as nobody needs them."""
        self._observe(events.Preempted(now, progress.id, progress.computed_tokens, reason))
        self._memory.release(progress, [])
        self._lines.move(progress, State.WAITING)
        progress.preemptions += 1
        progress.queued_s = now
