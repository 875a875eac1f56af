"""Fills one step: lets the policies wish, grants what memory and order allow, and moves the requests it serves. The
planning half of the scheduler, which owns it; keeps nothing from step to step but who was left without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from headrace.core import events
from headrace.core.ports import Observer
from headrace.core.step import Admitted, Beat, Block, Run, Work
from headrace.core.types import RequestId
from headrace.engine.beats import by_order
from headrace.engine.draft import Drafting
from headrace.engine.lanes import EVERYBODY, Step
from headrace.engine.memory import Memory
from headrace.engine.policies.joints import DraftView
from headrace.engine.policy import BatchView, Policies, PoolView, Share
from headrace.engine.progress import Progress, State
from headrace.engine.queue import Bounds, Lines


def _overtaking(waiting: Sequence[Progress], prefilling: Sequence[Progress]) -> Sequence[Progress]:
    """In order, all who prefill and those of the waiting who precede one of them; nobody if nobody does."""
    if not (waiting and prefilling and waiting[0].order < prefilling[-1].order):
        return ()
    ahead = takewhile(lambda one: one.order < prefilling[-1].order, waiting)
    return sorted([*prefilling, *ahead], key=by_order)


# What a request took for its next tokens, as `Work` tells of it: (blocks appended to its table, blocks replaced in it).
_Taken = tuple[tuple[Block, ...], tuple[tuple[int, Block], ...]]


class Planner:
    """Moves requests through `lines` and blocks through `memory`, as one step after the other needs it."""

    def __init__(
        self,
        policies: Policies,
        max_running: int,
        layers: int,
        lines: Lines,
        memory: Memory,
        drafting: Drafting,
        bounds: Bounds,
        observer: Observer,
    ) -> None:
        self._policies = policies
        self._patient = policies.patient
        self._repeatable = {startable: policies.repeatable(startable=startable) for startable in (False, True)}
        self._max_running = max_running
        self._layers = layers
        self._lines = lines
        self._memory = memory
        self._drafting = drafting
        self._budget = policies.budget
        self._bounds = bounds
        self._observe = observer.observe
        self._block_tokens = memory.block_tokens
        self._first_is_stuck = False  # the first in the ordering found no block: next time it goes before all others

    def fill(self, step: Step, most_steps: int) -> None:
        """Let the batch policy name its wishes, and grant what is possible. Whatever it wishes, the first in the
        ordering is not stuck twice in a row, and somebody is served."""
        lines = self._lines
        self._begin(step)
        if self._first_is_stuck:
            self._serve_first(step)
        elif State.WAITING in step.serves and self._startable and not self._patient:
            self._clear_the_way(step)
        prefilling = lines.prefilling.snapshot() if State.PREFILLING in step.serves else ()
        waiting = lines.waiting.snapshot() if State.WAITING in step.serves else ()
        overtaking = _overtaking(waiting, prefilling)
        view = BatchView(step.now, step.token_budget, step.decoding, prefilling, waiting, lines.fillers, overtaking)
        wishes = self._policies.batch(view)
        share = next(wishes, None)
        while share is not None:
            granted = self._grant(share, step)
            try:
                share = wishes.send(granted)
            except StopIteration:
                share = None
        if step.empty and not self._memory.fetching:
            self._serve_first(step)
        step.steps = self._repetitions(step, most_steps)
        if self._budget is not None:
            self._budget.planned(step.number, step.others, step.beat, self._layers)
        assert not step.empty or self._memory.fetching or step.serves is not EVERYBODY, "nobody was served"

    def fill_alone(self, step: Step, progress: Progress) -> bool:
        """One request and nobody beside it. Returns False if it may not start: `fill` the step then."""
        self._begin(step)
        return self._serve(progress, max(1, step.token_budget), False, step) > 0

    def _begin(self, step: Step) -> None:
        if self._budget is not None:
            step.token_budget = self._budget.begin(len(step.decoding), self._lines.decoding.context_tokens)

    def must_wait(self, serves: frozenset[State]) -> bool:
        """Whether a lane that serves these has nobody to serve; or has to wait because the first in the ordering found
        no block and belongs to another lane, which plans before anything new takes memory."""
        lines = self._lines
        here = {State.WAITING: lines.waiting, State.PREFILLING: lines.prefilling, State.DECODING: lines.decoding}
        if not any(here[state] for state in here.keys() & serves):
            return True
        running = lines.running() if self._first_is_stuck else []
        return bool(running) and running[0].state not in serves

    def order_matters(self) -> bool:
        """Whether anything in the next step depends on who is next: somebody could start, catches up, or has to yield.
        Where nothing does, requests are not sorted anew."""
        lines, free = self._lines, self._memory.pool.free
        quiet = self._repeatable[False] and not lines.prefilling and not self._first_is_stuck
        return not quiet or self._startable or len(lines.decoding.beginners()) > free

    @property
    def _startable(self) -> bool:
        """Whether somebody waits and there is a place, or somebody might leave one."""
        lines = self._lines
        return bool(lines.waiting) and (lines.running_count < self._max_running or not self._patient)

    def _serve_first(self, step: Step) -> None:
        self._first_is_stuck = False
        running = self._lines.running()
        mine = [one for one in running if one.state in step.serves]
        first = mine[0] if mine else None if running else self._lines.waiting.first
        if first is not None:
            self._serve(first, max(1, step.token_budget - len(step.decoding)), False, step)

    def _grant(self, share: Share, step: Step) -> int:
        if not share.requests:
            return 0
        if share.requests is step.decoding and share.tokens >= len(step.decoding) and step.beat is None:
            return (self._speculate(step) if self._drafting.on else 0) + self._beat(step)
        if share.cohort and self._layers > 1:
            return self._go_together(share, step)
        left = share.tokens
        for view in share.requests:
            if left <= 0:
                break
            progress = self._lines.live[view.request.id]
            if step.served(progress):
                continue
            left -= self._serve(progress, left, share.whole, step)
            if progress.state is State.WAITING:
                break
        return share.tokens - left

    def _serve(self, progress: Progress, most: int, whole: bool, step: Step) -> int:
        """Give one request up to `most` tokens of work, admitting it if it waits. Returns how many it got."""
        hits, start, tokens = self._missing(progress)
        fitting = most if self._budget is None else self._budget.fitting(start, most)
        if tokens > fitting and not progress.pending_tokens:
            if whole and not step.empty:
                return 0
            tokens = tokens if whole else fitting
        taken = self._take(progress, hits, start, tokens, step)
        return 0 if taken is None else self._advance(progress, taken, self._layers, step)

    def _speculate(self, step: Step) -> int:
        """Those whose next tokens somebody guesses leave the beat and compute these as well. Returns their worth."""
        lines, worth = self._lines, 0
        decoding = [progress for progress in lines.decoding.members if progress.served_step != step.number]
        room = step.token_budget - step.tokens - len(decoding)
        behind = bool(lines.prefilling) or self._startable
        for progress, drafts in self._drafting.offers(DraftView(decoding, lines.decoding.context_tokens, room, behind)):
            lines.decoding.remove(progress)
            progress.served_step = step.number
            progress.pending_tokens, progress.drafted_tokens = 1, len(drafts)
            step.drafted[progress] = drafts
            blocks = self._memory.grow(progress, progress.computed_tokens + 1 + len(drafts))
            worth += self._advance(progress, (blocks, ()), self._layers, step)
        return worth

    def _go_together(self, share: Share, step: Step) -> int:
        """`_grant` for those who may go through some of the layers only. As long as they fit they go through all of
        them; from the first on that does not, they take memory for all their tokens, and go on together by as many
        layers as fit. Who begins like one that is under way waits until it can share."""
        left, cohort, cohort_tokens = share.tokens, list[tuple[Progress, _Taken]](), 0
        for view in share.requests:
            if left <= 0:
                break
            progress = self._lines.live[view.request.id]
            if step.served(progress):
                continue
            hits, start, tokens = self._missing(progress)
            begun = progress.pending_tokens > 0
            fits = self._worth(start, tokens) <= left and not cohort
            whole = not begun and (fits or progress.state is State.DECODING)
            if not (begun or whole):
                room = min(share.cohort, left * self._layers) - cohort_tokens
                if (tokens > room and cohort) or self._begins_like_others(progress, start):
                    break
                tokens = min(tokens, room)
            taken = self._take(progress, hits, start, tokens, step)
            if taken is None:
                if progress.state is State.WAITING:
                    break
            elif whole:
                left -= self._advance(progress, taken, self._layers, step)
            else:
                cohort.append((progress, taken))
                cohort_tokens += progress.pending_tokens
        return share.tokens - left + self._advance_together(cohort, left, step)

    def _advance_together(self, cohort: Sequence[tuple[Progress, _Taken]], most: int, step: Step) -> int:
        """By as many layers as amount to `most` tokens through all of them, at least by one. Returns to how many."""
        tokens = sum(self._worth(progress.computed_tokens, progress.pending_tokens) for progress, _ in cohort)
        layers = max(1, most * self._layers // max(tokens, 1))
        worth = 0
        for progress, taken in cohort:
            left = self._layers - progress.passed_layers
            worth += min(layers, left) * self._advance(progress, taken, layers, step)
        return -(-worth // self._layers)

    def _begins_like_others(self, progress: Progress, start: int) -> bool:
        """Whether somebody computes what would be next to compute, and has yet to pass some layers with it."""
        running = self._lines.prefilling.members
        return any(self._memory.shares(progress, start, other) for other in running if other.pending_tokens)

    def _missing(self, progress: Progress) -> tuple[Sequence[Block], int, int]:
        """(blocks that others have computed for it, where its own tokens start, how many it lacks). Tokens that have
        passed some layers go on as they are."""
        start = progress.computed_tokens
        if progress.pending_tokens:
            return (), start, progress.pending_tokens
        hits = self._memory.match(progress)
        if hits:
            start = (start // self._block_tokens + len(hits)) * self._block_tokens
        return hits, start, progress.known_tokens - start

    def _take(self, progress: Progress, hits: Sequence[Block], start: int, tokens: int, step: Step) -> _Taken | None:
        """Memory for so many tokens from `start` on, or for as many as there is memory; they are pending then. Admits
        it if it waits. None if it may not start, there is no memory, or copies have to come first."""
        if progress.pending_tokens:
            progress.served_step = step.number
            return (), ()
        memory, waiting = self._memory, progress.state is State.WAITING
        copied = memory.on_host(progress, start) if waiting else ()
        own = len(copied) or (0 if start % self._block_tokens else 1)
        if memory.arriving(copied):
            return None
        if not (self._may_start(progress, hits, own, step) if waiting else self._make_room(progress, hits, own, step)):
            return None
        if progress.state is State.DECODING:
            self._lines.decoding.remove(progress)  # goes alone, for this step
        replaced = memory.adopt(progress, hits)
        if copied:
            memory.fetch(progress, copied)
        if waiting:
            self._admit(progress, step)
        if copied:
            progress.served_step = step.number
            return None
        adopted = () if waiting else tuple(hits[len(replaced) :])
        progress.pending_tokens = min(tokens, memory.reachable_tokens(progress) - start)
        progress.served_step = step.number
        return adopted + memory.grow(progress, start + progress.pending_tokens), replaced

    def _may_start(self, progress: Progress, hits: Sequence[Block], own: int, step: Step) -> bool:
        """Whether a waiting request is admitted now. Nobody takes what a request preempted in this step gave back, and
        an empty replica takes the first whatever the policy says."""
        step.held = "memory"
        if step.preempted and progress is not step.favoured:
            return False
        if step.beside and self._memory.cost(hits) + own > self._memory.pool.free:
            return False  # somebody has ended, but not yet the step that writes its blocks
        step.held = self._hindered(progress, hits, own, ())
        return not step.held

    def _hindered(self, progress: Progress, hits: Sequence[Block], own: int, without: Sequence[Progress]) -> str:
        """What keeps a waiting request from starting beside the running ones if those in `without` yielded, or ""."""
        running = self._lines.running_count - len(without)
        if not running:
            return ""
        if running >= self._max_running:
            return "places"
        adopted = self._memory.cost(hits)
        pool = self._pool_view(progress.request.tenant, without, hits)
        if adopted + own > pool.free_blocks:
            return "memory"
        progress.cached_blocks = len(hits) - adopted
        return "" if self._policies.admission(progress, pool) else "policy"

    def _pool_view(self, tenant: str, without: Sequence[Progress], hits: Sequence[Block]) -> PoolView:
        blocks_for, prefilling = self._memory.blocks_for, self._lines.prefilling.members
        view = PoolView(
            total_blocks=self._memory.pool.blocks,
            free_blocks=self._memory.pool.free_for(tenant),
            block_tokens=self._block_tokens,
            promised_blocks=sum(blocks_for(one.known_tokens) - len(one.blocks) for one in prefilling),
            reserved_blocks=self._lines.reserved_blocks,
            running=self._lines.decoding.members + prefilling,
        )
        if not without:
            return view
        kept = set(hits)
        blocks = (block for one in without for block in one.blocks if block not in kept)
        pending = (blocks_for(one.known_tokens) - len(one.blocks) for one in without if one in prefilling)
        return view._replace(
            free_blocks=view.free_blocks + self._memory.pool.only(blocks),
            promised_blocks=view.promised_blocks - sum(pending),
            reserved_blocks=view.reserved_blocks - sum(one.longest_blocks for one in without),
            running=[one for one in view.running if one not in without],
        )

    def _clear_the_way(self, step: Step) -> None:
        """If the first that waits may not start, those whom the preemption policy names yield to it, provided that it
        may start then. One in a step."""
        first = self._lines.waiting.first
        hits, running = self._memory.match(first), self._lines.running()
        own = len(self._memory.on_host(first, len(hits) * self._block_tokens)) or 1
        behind = [other for other in running if other.order > first.order and not step.served(other)]
        victims: list[Progress] = []
        while self._hindered(first, hits, own, victims):
            chosen = self._policies.preemption(behind, first) if behind else None
            victim = next((other for other in behind if other is chosen), None)
            if victim is None:
                return
            behind.remove(victim)
            victims.append(victim)
        for victim in victims:
            step.preempted, step.favoured = True, first
            self._yield(victim, step, "a request that waits", first)
        step.decoding = tuple(self._lines.decoding.members) if State.DECODING in step.serves else ()

    def _admit(self, progress: Progress, step: Step) -> None:
        """From here on the executor knows the request; its blocks so far all come from the cache."""
        now, cached_tokens, again = step.now, progress.computed_tokens, progress.first_admitted_s is not None
        if not again:
            progress.first_admitted_s = now
            progress.cached_tokens = cached_tokens
        progress.cached_blocks = 0
        self._lines.move(progress, State.PREFILLING)
        self._bounds.left(progress.prompt_tokens, now)
        step.admitted.append(
            Admitted(progress.request, tuple(progress.output_ids), tuple(progress.blocks), cached_tokens)
        )
        queue_s, missed = now - progress.queued_s, self._memory.missed(progress)
        self._observe(events.Admitted(now, progress.id, cached_tokens, queue_s, again, missed, progress.reads_cache))

    def _advance(self, progress: Progress, taken: _Taken, layers: int, step: Step) -> int:
        """Put the pending tokens into the step, through the next layers: the numbers move now. Returns their worth."""
        first, last = progress.passed_layers, min(progress.passed_layers + layers, self._layers)
        start, tokens = progress.computed_tokens, progress.pending_tokens
        computed = last == self._layers
        sample = computed and start + tokens == progress.known_tokens
        if computed:
            progress.computed_tokens = start + tokens
            progress.pending_tokens = progress.passed_layers = 0
            step.tokens += tokens
        else:
            progress.passed_layers = last
        if sample:
            step.drawing.append(progress)
            if not progress.output_tokens:
                step.first.append(progress)
            if progress.state is State.DECODING:
                self._lines.decoding.add(progress)
            elif State.DECODING in step.serves:
                self._lines.move(progress, State.DECODING)
        self._memory.name(progress, step.fresh)
        passed = None if last - first == self._layers else (first, last)
        drafts = step.drafted.get(progress, ()) if step.drafted else ()
        step.tokens += len(drafts)
        step.others.append(Work(progress.id, start, tokens + len(drafts), sample, *taken, passed, drafts=drafts))
        return self._worth(start, tokens + len(drafts))

    def _worth(self, start: int, tokens: int) -> int:
        """What so many tokens from `start` on take of the budget: one each, unless it says that context counts."""
        return tokens if self._budget is None else self._budget.worth(start, tokens)

    def _beat(self, step: Step) -> int:
        """`_serve` for all that are one token behind, by touching only those who begin a block."""
        decoding, memory = self._lines.decoding, self._memory
        begin = [progress for progress in decoding.beginners() if progress.served_step != step.number]
        apart = list(step.drawing)
        if len(begin) <= memory.pool.free:
            taken = memory.begin(begin)
        else:
            begin, taken = self._begin_each(begin, apart, step)
        if len(apart) == len(decoding):
            return 0
        gone = set(apart)
        step.members = tuple(one for one in decoding.members if one not in gone) if gone else tuple(decoding.members)
        longest = decoding.longest()
        rows, context_tokens = decoding.beat(apart)
        ids = tuple(progress.id for progress in apart)
        begun = {progress.id: (block,) for progress, block in zip(begin, taken, strict=True)}
        step.beat = Beat(decoding.pace.number - 1, rows, context_tokens, begun, ids, longest)
        step.tokens += len(rows)
        return len(rows) if self._budget is None else self._budget.worth_of_decodes(len(rows), context_tokens)

    def _begin_each(
        self, begin: list[Progress], apart: list[Progress], step: Step
    ) -> tuple[list[Progress], list[Block]]:
        """Not all of them find a block without somebody yielding, maybe one of themselves. Who finds none is added to
        those `apart`; returns the others and their blocks."""
        begun: list[Progress] = []
        taken: list[Block] = []
        for progress in begin:
            if progress.served_step == step.number:
                continue
            if self._make_room(progress, (), 1, step):
                begun.append(progress)
                taken += self._memory.begin([progress])
            else:
                apart.append(progress)
        return begun, taken

    def _repetitions(self, step: Step, most: int) -> int:
        """How often the same step may follow itself: as long as the policies would say the same, memory lasts without
        anybody yielding, and nobody reaches its length."""
        lines = self._lines
        unsettled = step.others or step.preempted or step.beat is None or step.beat.paused or lines.prefilling
        if most == 1 or unsettled or self._first_is_stuck or self._memory.copying:
            return 1
        if not self._repeatable[self._startable]:
            return 1
        more = min(most - 1, lines.decoding.until_end() or 0)
        return 1 + lines.decoding.affordable(self._memory.pool.free, more)

    def repeat(self, run: Run) -> float:
        """The beat was repeated like this; its first repetition is planned already. Returns the integral of the used
        blocks over the seconds it took. There are enough; executors that repeat need not know which."""
        pool = self._memory.pool
        seconds, used_block_s = run.first_s, pool.used * run.first_s
        for begin in self._lines.decoding.again(run.steps - 1):
            if begin:
                self._memory.begin(begin)
            seconds += run.slope_s
            used_block_s += pool.used * seconds
        return used_block_s

    def join(self, step: Step, beside: Iterable[Step]) -> list[Progress]:
        """Those who caught up in a lane without a beat, now that it is over, are in the next beat of the lane that has
        one. Returns those of them who have reached their length already."""
        joining = [progress for progress in step.drawing if progress.state is State.PREFILLING]
        for progress in joining:
            self._lines.move(progress, State.DECODING)
        for other in beside:
            other.joined += [progress.id for progress in joining]
        return [progress for progress in joining if progress.computed_tokens == progress.last_tokens]

    def again(self) -> None:
        """Plan the same beat once more."""
        for begin in self._lines.decoding.again(1):
            self._memory.begin(begin)

    def _make_room(self, progress: Progress, hits: Sequence[Block], own: int, step: Step) -> bool:
        """See that `hits` can be adopted and `own` blocks taken, if need be by preempting requests behind this one that
        this step has not served. Otherwise it keeps what it has and waits for its turn."""
        memory = self._memory
        while memory.pool.free < own + memory.cost(hits):
            running = self._lines.running()
            behind = [other for other in running if other.order > progress.order and not step.served(other)]
            if not behind:
                self._first_is_stuck |= progress is running[0]
                return False
            chosen = self._policies.preemption(behind, progress)
            victim = next((other for other in behind if other is chosen), behind[-1])
            step.preempted = True
            self._yield(victim, step, "memory", progress)
        return True

    def _yield(self, victim: Progress, step: Step, reason: str, by: Progress) -> None:
        victim.served_step = step.number
        self.preempt(victim, step.now, reason, by.id)

    def preempt(self, progress: Progress, now: float, reason: str, by: RequestId | None = None) -> None:
        """Back to waiting, to its old place in the ordering; its blocks stay cached as long as nobody needs them, and
        go to the host if there is a tier."""
        self._observe(events.Preempted(now, progress.id, progress.computed_tokens, reason, by))
        self._lines.move(progress, State.WAITING)
        self._memory.release(progress, [], waits=True)
        progress.preemptions += 1
        progress.queued_s = now
