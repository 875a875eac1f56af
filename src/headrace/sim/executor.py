"""Performs step plans by letting virtual time pass: the whole `Executor` port with a cost model behind it. A request
draws ANSWER_TOKEN until its answer is as long as it is to be, which only the executor knows, and STOP_TOKEN then.

Owns what it must remember of each request: how much of its answer is left, as a number of tokens while others wait for
it, as the number of a beat while it decodes. So a step costs what begins and ends in it, not what runs.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import count

from headrace.core import clock
from headrace.core.ports import Capacity
from headrace.core.step import Run, Sampled, StepPlan, StepResult, Work
from headrace.core.types import RequestId
from headrace.sim.beside import Beside
from headrace.sim.cost.batch import Batch, CostModel, StepCost, batch_of_plan, cut_of_plan, estimate_cut
from headrace.sim.cost.copies import HostLink
from headrace.sim.cost.divided import Divided, Price, price_of
from headrace.sim.drafts import Acceptance
from headrace.sim.spent import Spent
from headrace.workload.arrival import ANSWER_TOKEN, STOP_TOKEN

MOST_STEPS = 1 << 20  # of one plan
_STOP = Sampled((STOP_TOKEN,))


class _Answer:
    """What is left of one answer. `last_beat` is that of its last token, if nothing comes in between."""

    __slots__ = ("last_beat", "left", "request_id")

    def __init__(self, request_id: RequestId, left: int) -> None:
        self.request_id = request_id
        self.left = left  # tokens; meaningful while it does not decode
        self.last_beat: int | None = None  # set while it decodes


class SimulatedExecutor:
    """`lengths` holds the output tokens of every request that is admitted. `windows` are the attention windows of the
    model; `spent` hears what steps cost; without `acceptance` no draft is right; `host` prices copies, where there is a
    host tier. Raises RuntimeError on a clock that is real."""

    def __init__(
        self,
        capacity: Capacity,
        cost: CostModel,
        lengths: Mapping[RequestId, int],
        *,
        windows: tuple[int, ...] = (),
        spent: Spent | None = None,
        acceptance: Acceptance | None = None,
        host: HostLink | None = None,
    ) -> None:
        self._capacity = capacity
        self._cost = cost
        self._lengths = lengths
        self._windows = windows
        self._spent = spent
        self._beside = Beside(Divided(cost), spent)  # for plans of several lanes
        self._acceptance = acceptance
        self._host = host
        self._batch = Batch()  # of the plan under way
        self._price_of_one: StepCost | None = None  # and its price, unless it is a line
        self._answers: dict[RequestId, _Answer] = {}
        self._ends: list[tuple[int, int, _Answer]] = []  # a heap by last beat; entries may be out of date
        self._counter = count()
        self._beats = self._first_beat = 0  # so far, and before the plan under way
        self._begun_s = 0.0
        self._run = Run(1, 0.0)  # what is left of the repetitions under way
        self._over: asyncio.Future[None] | None = None  # while repetitions are under way
        self.error: Exception | None = None  # why a step could not be priced: nothing is worth simulating after it
        self._timer: asyncio.TimerHandle | None = None

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    async def run(self, plan: StepPlan) -> StepResult:
        self._begun_s = clock.virtual_now()
        if len(plan.lanes) > 1:
            return await self._run_beside(plan)
        try:
            self._update(plan)
            self._run = self._price(plan)
        except Exception as error:
            self.error = error
            raise
        if self._run.steps > 1:
            await self._repeat()
        else:
            await clock.sleep_until(self._begun_s + self._run.first_s)
        if plan.beat is not None:
            self._beats = self._first_beat + self._run.steps
        if self._spent is not None:
            self._account(self._spent, 1 if plan.beat is None else self._beats - plan.beat.number)
        return StepResult(plan.step, self._draw(plan), others_drew=ANSWER_TOKEN, run=self._run)

    async def _run_beside(self, plan: StepPlan) -> StepResult:
        """`run` where other lanes have steps under way. Who comes to draw meanwhile is in the beat after this one."""
        begun_s = self._begun_s
        try:
            self._update(plan)
            if plan.beat is not None:
                self._beats = plan.beat.number + 1
            if plan.others or plan.beat is not None:
                await self._beside.run(self._price_by(plan), plan.lanes[plan.lane].share)
        except Exception as error:
            self.error = error
            raise
        drew = self._draw(plan)
        return StepResult(plan.step, drew, others_drew=ANSWER_TOKEN, run=Run(1, clock.virtual_now() - begun_s))

    def _price_by(self, plan: StepPlan) -> Price:
        if any(work.layers is not None for work in plan.others):
            cut = cut_of_plan(plan, self._capacity.layers, self._windows)
            return lambda model: estimate_cut(model, cut)
        return price_of(batch_of_plan(plan, self._windows))

    def interrupt(self) -> Run | None:
        """See `core.ports.Executor`. What ends at this very moment is still in progress."""
        if self._over is None or self._over.done():
            return None
        run, elapsed_s = self._run, clock.now() - self._begun_s
        steps = bisect_left(range(1, run.steps), elapsed_s, key=run.until)  # that are over
        over = Run(steps, run.first_s, run.slope_s)
        self._begun_s += over.total_s
        self._first_beat += steps
        self._run = Run(1, run.first_s + steps * run.slope_s, run.slope_s)
        self._over.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        return over if steps else None

    async def close(self) -> None:
        self._answers.clear()

    # -- time ----------------------------------------------------------------------------------------------------------

    def _price(self, plan: StepPlan) -> Run:
        """How many repetitions there will be if nobody interrupts, and what each costs."""
        if plan.copies:
            self._price_of_one = self._with_copies(plan)
            return Run(1, self._price_of_one.seconds)
        if not plan.others and plan.beat is None:
            self._price_of_one = StepCost(0.0)
            return Run(1, 0.0)
        if any(work.layers is not None for work in plan.others):
            cut = cut_of_plan(plan, self._capacity.layers, self._windows)
            self._price_of_one = estimate_cut(self._cost, cut)
            return Run(1, self._price_of_one.seconds)
        batch = self._batch = batch_of_plan(plan, self._windows)
        most = min(plan.steps, self._until_stop() - self._beats + 1) if plan.steps > 1 else 1
        if most <= 1:
            self._price_of_one = self._cost.estimate(batch)
            return Run(1, self._price_of_one.seconds)
        self._price_of_one = None
        line = self._cost.line(batch, most)
        run = Run(min(line.steps, most), line.first_s, line.slope_s)
        if plan.until_s == math.inf:
            return run
        left_s = plan.until_s - self._begun_s  # the first repetition that ends after them is the last
        return run._replace(steps=1 + bisect_left(range(1, run.steps), left_s, key=run.until))

    def _with_copies(self, plan: StepPlan) -> StepCost:
        """Such a plan stands for one step."""
        assert self._host is not None, "the capacity has a host tier, and nobody said what it costs"
        self._price(plan._replace(copies=()))
        work = self._price_of_one or self._cost.estimate(self._batch)
        seconds = self._host.step_s(plan, work.seconds)
        moved = sum(len(copy.pairs) for copy in plan.copies) * self._host.block_bytes
        return work._replace(seconds=seconds, copy_s=seconds - work.seconds, copied_bytes=moved)

    def _account(self, spent: Spent, steps: int) -> None:
        """Along a line every term is affine in the number of the step, so the middle one is the mean of all."""
        spent.add(self._price_of_one or self._cost.estimate(self._batch.advanced((steps - 1) / 2)), steps)

    def _until_stop(self) -> int:
        """The beat in which the next answer ends."""
        ends = self._ends
        while ends and not self._holds(ends[0]):
            heappop(ends)
        return ends[0][0] if ends else MOST_STEPS

    async def _repeat(self) -> None:
        """Sleep to the end of all repetitions, or of the one in progress when somebody interrupts."""
        if clock.jump(self._begun_s + self._run.total_s):
            return
        loop = asyncio.get_running_loop()
        over = self._over = loop.create_future()
        self._timer = loop.call_at(self._begun_s + self._run.total_s, over.set_result, None)
        try:
            await over
        finally:
            self._timer.cancel()
            self._timer = self._over = None
        if clock.now() < (end_s := self._begun_s + self._run.total_s):
            await clock.sleep_until(end_s)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _update(self, plan: StepPlan) -> None:
        for request_id in plan.released:
            answer = self._answers.pop(request_id, None)
            if answer is not None:
                answer.last_beat = None  # and so its end is out of date
        for admitted in plan.admitted:
            name = admitted.request.id
            self._answers[name] = _Answer(name, max(1, self._lengths[name] - len(admitted.output_ids)))
        if plan.beat is not None:
            self._beats = self._first_beat = plan.beat.number
            for name in plan.beat.paused:
                answer = self._answers.get(name)
                if answer is not None and answer.last_beat is not None:
                    self._decodes(answer, answer.last_beat + 1)

    def _draw(self, plan: StepPlan) -> dict[RequestId, Sampled]:
        """Who draws a stop token, or several tokens. `_beats` counts those of this plan too."""
        alone = {work.request_id: self._draws_alone(work) for work in plan.others if work.sample}
        drawn = {request_id: sampled for request_id, sampled in alone.items() if sampled is not None}
        if plan.beat is None and len(plan.lanes) > 1:
            return drawn  # a beat that is under way in another lane is not over
        while self._ends and self._ends[0][0] < self._beats:
            last_beat, _, answer = heappop(self._ends)
            if answer.last_beat == last_beat:
                drawn.setdefault(answer.request_id, _STOP)
        return drawn

    def _draws_alone(self, work: Work) -> Sampled | None:
        """A token outside the beat, and one for every draft that is right; None if that is one, and not the last."""
        answer, accepted = self._answers[work.request_id], 0
        left = answer.left if answer.last_beat is None else answer.last_beat - self._beats + 1
        if work.drafts and self._acceptance is not None:
            position = work.start + work.tokens - len(work.drafts)
            accepted = self._acceptance.accepted(work.request_id, position, len(work.drafts))
        tokens = min(accepted + 1, left)
        self._decodes(answer, self._beats + left - tokens - 1)
        if tokens == left:
            return Sampled((*work.drafts[: tokens - 1], STOP_TOKEN))
        return None if tokens == 1 else Sampled((*work.drafts[: tokens - 1], ANSWER_TOKEN))

    def _decodes(self, answer: _Answer, last_beat: int) -> None:
        answer.last_beat = last_beat
        heappush(self._ends, (last_beat, next(self._counter), answer))

    def _holds(self, end: tuple[int, int, _Answer]) -> bool:
        return end[2].last_beat == end[0]
