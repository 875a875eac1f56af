"""Two lanes: a recording of both replays to the same plans, whatever the order in which their steps began and ended."""

from __future__ import annotations

import asyncio
import io
import random
import sys
from pathlib import Path

import pytest

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Preempted
from headrace.core.ports import Capacity
from headrace.core.step import StepPlan, StepResult
from headrace.engine.loop import Engine
from headrace.engine.policies.lanes import LANES, Measured
from headrace.engine.policy import choose
from headrace.engine.scheduler import Scheduler
from headrace.sim import replay
from headrace.sim.recording import Recorder, read

sys.path.append(str(Path(__file__).parent.parent / "engine"))
from engine_rig import make_request
from null_executor import NullExecutor


class Uneven(NullExecutor):
    """Steps of many lengths, so that lanes meet in every way."""

    rng: random.Random

    async def run(self, plan: StepPlan) -> StepResult:
        self.begin(plan)
        await clock.sleep(self.rng.choice([0.004, 0.01, 0.011, 0.05]))
        if plan.step in self.failing:
            self.end(plan)
            self.spoil(plan)
            raise RuntimeError("the device fell over")
        return self.end(plan)


class Deaf:
    def observe(self, event: object) -> None:
        self.preempted = getattr(self, "preempted", 0) + isinstance(event, Preempted)


def record(seed: int, lanes: str, ordering: str) -> tuple[bytes, int]:
    rng, file = random.Random(seed), io.BytesIO()
    capacity = Capacity(14, 4, 48, 50)
    setting = EngineSettings(block_tokens=4, max_running=6, lanes=lanes, ordering=ordering, inter_token_ms=25.0)
    executor = Uneven(capacity, failing=frozenset({17}))
    executor.rng = rng
    told = Deaf()
    recorder = Recorder(executor, told, file.write, settings=setting, token_budget=16, step_s=(0.01, 0.001))
    policies = choose(setting, predict=Measured(0.01, 0.001), step_s=(0.01, 0.001))
    scheduler = Scheduler(setting, capacity, token_budget=16, observer=recorder, policies=policies)
    engine = Engine("recorded", scheduler, recorder)

    async def live() -> None:
        serving = asyncio.create_task(engine.run())
        for number in range(40):
            prompt = [*range(rng.choice([0, 4, 9])), *rng.choices(range(5), k=rng.randint(1, 9))]
            due = clock.now() + 0.4 if rng.random() < 0.2 else None
            engine.submit(make_request(str(number), prompt, rng.randint(1, 12), arrival_s=clock.now(), deadline_s=due))
            await clock.sleep(rng.expovariate(20.0))
            if rng.random() < 0.2:
                engine.abort(str(rng.randint(0, number)))
        assert await engine.drain(1000.0)
        await clock.sleep(1.0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    clock.run(live(), virtual=True)
    scheduler.check()
    assert scheduler.used_blocks == 0
    assert not executor.known
    return file.getvalue(), told.preempted


@pytest.mark.parametrize("lanes", [name for name in LANES if name != "one"])
@pytest.mark.parametrize("ordering", ["fcfs", "prefix-groups", "vtc"])
def test_a_recording_of_two_lanes_replays_to_the_same_plans(lanes: str, ordering: str) -> None:
    recorded, preempted = record(3, lanes, ordering)
    replayed = replay.check(read(io.BytesIO(recorded)))
    assert replayed.difference is None
    assert len(replayed.digests) == recorded.count(b'"type":"plan"') > 100
    assert recorded.count(b'"lane":1') > 30
    assert preempted > 2


@pytest.mark.parametrize("ordering", ["fcfs", "vtc"])
def test_a_budget_that_follows_the_steps_replays_to_the_same_plans(ordering: str) -> None:
    recorded, _ = record(5, "one", ordering)
    replayed = replay.check(read(io.BytesIO(recorded)))
    assert replayed.difference is None
    assert len(replayed.digests) == recorded.count(b'"type":"plan"') > 60
    fixed = recorded.replace(b'"step_s":[0.01,0.001]', b'"step_s":null')
    assert replay.check(read(io.BytesIO(fixed))).difference is not None, "the durations decided nothing"


def test_a_recording_that_was_changed_is_told() -> None:
    recorded, _ = record(4, "fixed", "fcfs")
    lines = recorded.splitlines(keepends=True)
    arrival = next(at for at, line in enumerate(lines) if b'"type":"arrive"' in line and at > 30)
    replayed = replay.check(read(io.BytesIO(b"".join([*lines[:arrival], *lines[arrival + 1 :]]))))
    assert replayed.difference is not None
    assert "step" in replayed.difference
