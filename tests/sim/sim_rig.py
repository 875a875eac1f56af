"""What the tests of the simulator share: a price linear in the sums of a step, traffic out of a seed, and a run that
keeps every plan, every event and the time of every token, and checks every invariant before each step."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Admitted, Decoded, Drew, Event, Finished, Preempted
from headrace.core.ports import Capacity
from headrace.core.step import Run, StepPlan, StepResult
from headrace.core.types import RequestId
from headrace.engine.loop import Engine
from headrace.engine.scheduler import Scheduler
from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.cost.copies import HostLink
from headrace.sim.executor import SimulatedExecutor
from headrace.sim.feed import Feed
from headrace.sim.stats import Stats
from headrace.workload.arrival import Arrival, Stretch, Traffic

MANY = 1 << 20


class Linear:
    """Seconds of a step as a sum over what it computes and reads; `longest` repetitions to a line."""

    def __init__(self, longest: int = MANY) -> None:
        self.longest = longest
        self.asked = 0

    def estimate(self, batch: Batch) -> StepCost:
        self.asked += 1
        compute_s, memory_s = 2.07e-5 * batch.tokens + 1e-9 * batch.full.pairs, 1.9e-8 * batch.full.decode_context
        seconds = 0.00613 + compute_s + memory_s
        return StepCost(seconds, compute_s, memory_s, overhead_s=0.00613, joules=3 * compute_s + 2 * seconds)

    def line(self, batch: Batch, steps: int) -> Line:
        return Line(self.estimate(batch).seconds, 1.9e-8 * batch.full.growing, min(steps, self.longest))


def traffic(seed: int, count: int, rate: float, *, longest: int = 60, cancels: float = 0.0) -> Iterator[Arrival]:
    """Poisson arrivals; some prompts begin alike, some clients go away."""
    rng, at_s = random.Random(seed), 0.0
    for number in range(count):
        at_s += rng.expovariate(rate)
        shared = Stretch(rng.choice([8, 20, 33]), rng.randrange(3))
        own = Stretch(rng.randint(1, longest), 1000 + number if rng.random() < 0.7 else None)
        yield Arrival(
            at_s,
            (shared, own) if rng.random() < 0.5 else (own,),
            rng.randint(1, longest),
            cancel_s=rng.random() if rng.random() < cancels else None,
            priority=rng.randrange(3),
            tenant=("", "", "t1", "t2")[number % 4],
        )


@dataclass
class Watched:
    """One replica under watch."""

    settings: EngineSettings
    capacity: Capacity
    budget: int = 32
    cost: Linear = field(default_factory=Linear)
    plans: list[StepPlan] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    token_s: dict[RequestId, list[float]] = field(default_factory=lambda: defaultdict(list))
    stats: Stats = field(default_factory=Stats)
    gone: set[RequestId] = field(default_factory=set)
    host: HostLink | None = None
    patience_s: tuple[float, ...] = ()  # deadlines after arrival, dealt in turn

    def run(self, arrivals: Iterable[Arrival], clients: int = 1) -> Watched:
        clock.run(self._run(arrivals, clients), virtual=True)
        return self

    async def _run(self, arrivals: Iterable[Arrival], clients: int) -> None:
        size = self.capacity.block_tokens
        self.feed = Feed(enumerate(arrivals), block_tokens=size, max_new_tokens=50, clients=clients)
        spent = self.stats.totals.spent
        self.executor = SimulatedExecutor(self.capacity, self.cost, self.feed.lengths, spent=spent, host=self.host)
        self.scheduler = Scheduler(self.settings, self.capacity, token_budget=self.budget, observer=self)
        engine = Engine("watched", self.scheduler, _Watch(self))

        def send(number: int, sent: Traffic) -> Engine:
            request = sent.request
            if self.patience_s:
                patience_s = self.patience_s[number % len(self.patience_s)]
                request = replace(request, deadline_s=request.arrival_s + patience_s)
            engine.submit(request)
            return engine

        serving = asyncio.create_task(engine.run())
        self.feed.begin(send)
        await self.feed.done.wait()
        assert engine.status().state == "ready", engine.status().error
        await clock.sleep(1.0)  # the executor hears of the last release
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        if self.feed.error is not None:
            raise self.feed.error
        self.scheduler.check()
        assert self.scheduler.live == self.scheduler.used_blocks == 0
        assert not self.executor._answers, "the executor was not told to forget everybody"

    def observe(self, event: Event) -> None:
        self.stats.observe(event)
        self.events.append(event)
        if isinstance(event, Finished):
            self.feed.ended(event.request_id)
            self.gone.add(event.request_id)
        if isinstance(event, Drew):
            for name in event.request_ids:
                self.token_s[name].append(event.at_s)
        elif isinstance(event, Decoded):
            begun_s = event.at_s - event.run.total_s
            for name, _ in event.rows:
                if name not in self.gone:
                    self.token_s[name] += [begun_s + event.run.until(step + 1) for step in range(event.run.steps)]

    def story(self) -> list[tuple[object, ...]]:
        """Who was admitted onto which cached tokens, preempted with which loss, and ended how, in this order."""
        story: list[tuple[object, ...]] = []
        for event in self.events:
            match event:
                case Admitted():
                    story.append(("admitted", event.request_id, event.cached_tokens, event.again))
                case Preempted():
                    story.append(("preempted", event.request_id, event.lost_tokens))
                case Finished():
                    story.append(("finished", event.request_id, event.reason, event.usage))
        return story

    def blocks(self) -> list[tuple[object, ...]]:
        """The blocks that plans name outside of beats, which depend on everything that was taken and given back."""
        admitted = [(one.request.id, one.blocks) for plan in self.plans for one in plan.admitted]
        return [*admitted, *((work.request_id, work.new_blocks) for plan in self.plans for work in plan.others)]


class _Watch:
    """The executor, with a look at everything before each step."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self.capacity = watched.capacity

    async def run(self, plan: StepPlan) -> StepResult:
        self._watched.plans.append(plan)
        if plan.step % 5 == 0 or plan.steps > 1:
            self._watched.scheduler.check()
        return await self._watched.executor.run(plan)

    def interrupt(self) -> Run | None:
        return self._watched.executor.interrupt()

    async def close(self) -> None:
        await self._watched.executor.close()
