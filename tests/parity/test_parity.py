"""Live runs with a real model, recorded and replayed under virtual time: the plans are the same, every one of them."""

from __future__ import annotations

import asyncio
import io
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from rig import Model, request

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Admitted, Event, Finished, Preempted, Verified
from headrace.core.ports import Capacity, Executor
from headrace.core.step import StepPlan, StepResult
from headrace.core.types import FinishReason, Output, Request, Sampling
from headrace.engine.loop import Engine
from headrace.engine.scheduler import Scheduler
from headrace.sim.recording import Abort, Arrive, Done, Entry, Plan, Recorder, read
from headrace.sim.replay import check

VOCAB = 200
Client = Callable[[Engine], Awaitable[None]]


@dataclass
class Live:
    """One live run: the client's side of it, and what the recorder wrote."""

    model: Model
    settings: EngineSettings
    blocks: int = 256
    host_blocks: int = 0
    budget: int = 64
    failing: frozenset[int] = frozenset()
    counts: Counter[str] = field(default_factory=Counter)
    file: io.BytesIO = field(default_factory=io.BytesIO)

    def observe(self, event: Event) -> None:
        self.counts["preempted"] += isinstance(event, Preempted)
        self.counts["cached"] += event.cached_tokens if isinstance(event, Admitted) else 0
        if isinstance(event, Verified):
            self.counts["accepted"] += sum(event.accepted)
            self.counts["rejected"] += sum(event.drafted) - sum(event.accepted)
        if isinstance(event, Finished):
            self.counts[event.reason.value] += 1

    def run(self, client: Client) -> list[Entry]:
        clock.run(self._serve(client))
        self.file.seek(0)
        entries = list(read(self.file))
        contents = [entry.content for entry in entries if isinstance(entry, Plan) and entry.content]
        self.counts["cut"] += sum(work[6] is not None for plan in contents for work in plan["work"])
        for source, _, pairs in (copy for plan in contents for copy in plan["copies"]):
            self.counts[f"from the {source}"] += len(pairs)
        return entries

    async def _serve(self, client: Client) -> None:
        executor = _Failing(self.model.executor(self.blocks, self.host_blocks), self.failing)
        recorder = Recorder(executor, self, self.file.write, settings=self.settings, token_budget=self.budget)
        scheduler = Scheduler(self.settings, recorder.capacity, token_budget=self.budget, observer=recorder)
        engine = Engine("tiny", scheduler, recorder)
        serving = asyncio.create_task(engine.run())
        await client(engine)
        await engine.drain(30)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await executor.close()


@dataclass
class _Failing:
    """The real executor, but some of its steps fail."""

    executor: Executor
    failing: frozenset[int]

    @property
    def capacity(self) -> Capacity:
        return self.executor.capacity

    async def run(self, plan: StepPlan) -> StepResult:
        if plan.step in self.failing:
            await self.executor.run(StepPlan(plan.step, (), released=plan.released))
            raise RuntimeError("the device fell over")
        return await self.executor.run(plan)

    def interrupt(self) -> None:
        return

    async def close(self) -> None:
        await self.executor.close()


async def watch_for(engine: Engine, one: Request, wanted: frozenset[int]) -> None:
    """What the gateway does for stop strings: read, and end the request once it has said it."""
    async for output in engine.generate(one):
        if wanted.intersection(output.token_ids) and output.finish is None:
            engine.abort(one.id, FinishReason.STOP)


async def stopping(engine: Engine) -> None:
    """Some requests end by a stop token, some because of what they said."""
    rng = random.Random(9)
    readers = []
    for number in range(40):
        some = frozenset(rng.sample(range(VOCAB), 20))
        one = make(rng, number, [], stop_token_ids=some if number % 2 else frozenset())
        readers.append(asyncio.create_task(watch_for(engine, one, frozenset() if number % 2 else some)))
        await clock.sleep(0.004 * rng.random())
    await asyncio.gather(*readers)


async def consume(stream: AsyncIterator[Output], most: int = 10**9) -> list[int]:
    """Read up to `most` outputs, then go away."""
    ids: list[int] = []
    async for output in stream:
        ids += output.token_ids
        most -= 1
        if not most:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return ids


def make(rng: random.Random, number: int, prefix: list[int], new: int = 40, **more: object) -> Request:
    ids = prefix + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))]
    one = request(f"r{number}", ids, rng.randrange(1, new), Sampling(temperature=1.0, seed=number), **more)
    return replace(one, arrival_s=clock.now())


def crowd(count: int, gap_s: float, shared: int = 0, *, most: int = 10**9, **more: int) -> Client:
    """`count` clients who come one after the other; every third reads `most` outputs only."""

    async def client(engine: Engine) -> None:
        rng = random.Random(count)
        prefix = [rng.randrange(VOCAB) for _ in range(shared)]
        readers = []
        for number in range(count):
            stream = engine.generate(make(rng, number, prefix, **more))
            readers.append(asyncio.create_task(consume(stream, most if number % 3 == 0 else 10**9)))
            await clock.sleep(gap_s * rng.random())
        await asyncio.gather(*readers)

    return client


async def conversations(engine: Engine) -> None:
    """Several turns each: a prompt is the whole conversation so far, so generated blocks are found again."""

    async def talk(number: int) -> None:
        rng = random.Random(number)
        said = [rng.randrange(VOCAB) for _ in range(20)]
        for turn in range(4):
            one = request(f"c{number}-{turn}", said, 24, Sampling(temperature=1.0, seed=number))
            said = said + await consume(engine.generate(replace(one, arrival_s=clock.now())))
            said += [rng.randrange(VOCAB) for _ in range(5)]

    await asyncio.gather(*map(talk, range(6)))


async def repeating(engine: Engine) -> None:
    """Answers out of a few tokens, so that there is much to guess; some end by a stop token or for what they said."""
    rng = random.Random(11)
    readers = []
    for number in range(30):
        few = rng.sample(range(VOCAB), 5)
        sampling = Sampling(temperature=1.0, seed=number, logit_bias=tuple((token, 9.0) for token in few))
        prompt = [rng.choice(few) for _ in range(rng.randrange(10, 40))]
        some = frozenset(rng.sample(range(VOCAB), 12))
        one = request(f"r{number}", prompt, 60, sampling, stop_token_ids=some if number % 2 else frozenset())
        one = replace(one, arrival_s=clock.now())
        readers.append(asyncio.create_task(watch_for(engine, one, frozenset() if number % 2 else some)))
        await clock.sleep(0.01 * rng.random())
    await asyncio.gather(*readers)


async def impatient(engine: Engine) -> None:
    """Priorities, and deadlines that some miss in the queue and some while they run."""
    rng = random.Random(8)
    readers = []
    for number in range(40):
        one = make(rng, number, [], new=60, priority=rng.randrange(-2, 3))
        one = replace(one, deadline_s=one.arrival_s + rng.choice([0.002, 0.02, 0.05, 10.0]))
        readers.append(asyncio.create_task(consume(engine.generate(one))))
        await clock.sleep(0.002 * rng.random())
    await asyncio.gather(*readers)


SWAP = EngineSettings(ordering="markov", preemption="swap", priority_updates=0.3, max_running=6)

RUNS: dict[str, tuple[dict[str, object], Client, dict[str, int]]] = {
    # name: (how it is served, the clients, what must have happened at least so often)
    "light": ({}, crowd(12, 0.02), {"length": 12}),
    "heavy": ({"settings": EngineSettings(max_running=6)}, crowd(60, 0.0), {"length": 60}),
    "sharing": ({}, conversations, {"length": 24, "cached": 200}),
    "preemption": ({"blocks": 20}, crowd(30, 0.001, 33, new=80), {"preempted": 3, "cached": 100}),
    "aborts": ({"blocks": 64}, crowd(40, 0.004, 20, most=5), {"abort": 5, "length": 20}),
    "deadlines": (
        {"settings": EngineSettings(ordering="priority", batch="prefill-first", max_running=8)},
        impatient,
        {"deadline": 3, "length": 5},
    ),
    "stops": ({}, stopping, {"stop": 20}),
    "layers": (
        {"settings": EngineSettings(batch="layered"), "budget": 24, "blocks": 32},
        crowd(40, 0.002, 20, most=5, new=60),
        {"cut": 20, "abort": 5, "preempted": 1, "cached": 100},
    ),
    "drafts": (
        {"settings": EngineSettings(speculate="lookup"), "blocks": 48},
        repeating,
        {"stop": 5},  # how much is drafted follows from real durations; the next case drafts whatever they are
    ),
    "all drafts": (
        {"settings": EngineSettings(speculate="lookup", draft_control="always"), "blocks": 24},
        repeating,
        {"accepted": 100, "rejected": 100, "stop": 5, "preempted": 1},
    ),
    "swapping": (
        {"settings": SWAP, "blocks": 24, "host_blocks": 60, "failing": frozenset({30})},
        crowd(40, 0.001, 33, most=5, new=80),
        {"preempted": 10, "from the device": 20, "from the host": 10, "abort": 5, "error": 1},
    ),
    "turns from the host": (
        {"blocks": 20, "host_blocks": 100, "settings": EngineSettings(max_running=2)},
        conversations,
        {"from the device": 20, "from the host": 5, "cached": 200},
    ),
    "failures": ({"failing": frozenset({5, 40})}, crowd(20, 0.004, 20), {"error": 1, "length": 5}),
}


@pytest.mark.parametrize("name", RUNS)
def test_plans_are_identical(tiny: Model, name: str) -> None:
    served, client, least = RUNS[name]
    live = Live(tiny, **{"settings": EngineSettings(), **served})  # type: ignore[arg-type]
    entries = live.run(client)
    for what, times in least.items():
        assert live.counts[what] >= times, f"the run shows no {what}: {live.counts}"
    planned = tuple(entry.digest for entry in entries if isinstance(entry, Plan))
    replayed = check(entries)
    assert replayed.difference is None
    assert replayed.digests == planned
    assert len(planned) > 20


@pytest.fixture(scope="module")
def recording(tiny: Model) -> list[Entry]:
    return Live(tiny, EngineSettings(), blocks=40).run(crowd(20, 0.002, 20, most=5))


def first(entries: list[Entry], kind: type[Entry], skip: int = 0) -> int:
    return [at for at, entry in enumerate(entries) if isinstance(entry, kind)][skip]


def test_a_lost_abort_is_noticed(recording: list[Entry]) -> None:
    at = first(recording, Abort)
    assert check(recording[:at] + recording[at + 1 :]).difference is not None


def test_the_first_difference_is_explained(recording: list[Entry]) -> None:
    at = first(recording, Plan, 9)
    plan = recording[at]
    assert isinstance(plan, Plan)
    assert plan.content is not None
    content = msgspec.json.decode(msgspec.json.encode(plan.content))
    content["work"][0][2] += 1
    changed = msgspec.structs.replace(plan, content=content, digest="0" * 16)
    replayed = check([*recording[:at], changed, *recording[at + 1 :]])
    assert replayed.difference is not None
    assert replayed.difference.startswith(f"step {plan.step}, row 0 (request, start, tokens")
    assert len(replayed.digests) == 9


def test_an_unexpected_arrival_is_noticed(recording: list[Entry]) -> None:
    at = first(recording, Arrive, 3)
    arrival = recording[at]
    assert isinstance(arrival, Arrive)
    stranger = msgspec.structs.replace(arrival, id="stranger")
    assert "stranger" in str(check([*recording[: at + 1], stranger, *recording[at + 1 :]]).difference)


def test_a_recording_that_breaks_off_is_played_to_its_end(recording: list[Entry]) -> None:
    at = first(recording, Done, 12)
    replayed = check(recording[:at])
    assert replayed.difference is None
    assert len(replayed.digests) == 13


def test_a_plan_that_the_replay_does_not_make(recording: list[Entry]) -> None:
    late = msgspec.structs.replace(recording[first(recording, Plan)], step=0)  # type: ignore[arg-type]
    assert "nothing to do" in str(check([recording[0], late]).difference)
