"""Lanes on a CPU: how cores are divided, and that a request's tokens and bits do not depend on the lanes."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Generated, Model, Rig, _join, request

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Event
from headrace.core.step import Lane, StepPlan, StepResult
from headrace.core.types import Output, Request, Sampling
from headrace.device.reference.lanes import Workers, divided
from headrace.engine.loop import Engine
from headrace.engine.policies.lanes import Measured
from headrace.engine.policy import choose
from headrace.engine.scheduler import Scheduler

NO_CACHE = EngineSettings(prefix_cache=False)
torch_only = pytest.mark.parametrize("tiny", ["torch"], indirect=True, scope="session")  # native takes one step


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 64), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_cores_are_divided_by_shares(count: int, prompts: float, decodes: float) -> None:
    cores = list(range(count))
    first, last = divided(cores, (prompts, decodes))
    assert first
    assert last
    assert first == tuple(cores[: len(first)])
    assert last == tuple(cores[count - len(last) :])
    for share, some in ((prompts, first), (decodes, last)):
        assert abs(len(some) - share * count) <= 1.5 or len(some) == 1
    if prompts + decodes <= 1.0 and count > 1:
        assert not set(first) & set(last)


def test_a_lane_keeps_its_thread_as_long_as_its_cores() -> None:
    workers = Workers([0])
    try:
        half, other = (Lane(0.5), Lane(0.5)), (Lane(0.4), Lane(0.9))
        assert workers.of(0, half) is workers.of(0, other)
        assert workers.of(0, half) is not workers.of(1, half)
        assert workers.of(0, half).submit(torch.get_num_threads).result() == 1
    finally:
        workers.close()


def requests(count: int, shared: int, longest: int = 150) -> list[Request]:
    rng = random.Random(count)
    prefix = [rng.randrange(500) for _ in range(shared)]
    samplings = [Sampling(temperature=0, logprobs=2), Sampling(temperature=0.9, top_p=0.9, seed=6, logprobs=2)]
    return [
        request(
            f"r{number}",
            prefix + [rng.randrange(500) for _ in range(rng.randrange(1, longest))],
            rng.randrange(1, 30),
            samplings[number % 2],
        )
        for number in range(count)
    ]


class Live:
    """An engine with two lanes on the real clock."""

    def __init__(self, model: Model, setting: EngineSettings, blocks: int, budget: int) -> None:
        self.executor = model.executor(blocks)
        self.beside = self.most = 0
        run = self.executor.run

        async def counted(plan: StepPlan) -> StepResult:
            self.beside += 1
            self.most = max(self.most, self.beside)
            try:
                return await run(plan)
            finally:
                self.beside -= 1

        self.executor.run = counted  # type: ignore[method-assign]
        self.setting, self.budget = setting, budget

    def observe(self, event: Event) -> None:
        return

    def run(self, batch: list[Request]) -> dict[str, Generated]:
        return clock.run(self._run(batch))

    async def _run(self, batch: list[Request]) -> dict[str, Generated]:
        policies = choose(self.setting, predict=Measured(0.001, 1e-5))
        scheduler = Scheduler(
            self.setting, self.executor.capacity, token_budget=self.budget, observer=self, policies=policies
        )
        engine = Engine("live", scheduler, self.executor)
        serving = asyncio.create_task(engine.run())

        async def one(each: Request) -> tuple[str, Generated]:
            outputs: list[Output] = [output async for output in engine.generate(each)]
            return each.id, _join(outputs)

        try:
            return dict(await asyncio.gather(*(one(each) for each in batch)))
        finally:
            scheduler.check()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await self.executor.close()


@pytest.fixture(scope="module")
def alone(tiny: Model) -> dict[str, Generated]:
    return {one.id: Rig(tiny, settings=NO_CACHE).run([one])[one.id] for one in requests(24, 60)}


@torch_only
@pytest.mark.parametrize("lanes", ["fixed", "semi-pd", "nexus"])
@pytest.mark.parametrize(("blocks", "budget"), [(4096, 64), (40, 2048)])
def test_two_lanes_draw_the_same_tokens_with_the_same_bits(
    tiny: Model, alone: dict[str, Generated], lanes: str, blocks: int, budget: int
) -> None:
    live = Live(tiny, EngineSettings(lanes=lanes), blocks, budget)
    assert live.run(requests(24, 60)) == alone
    assert live.most == 2, "the lanes never met"


@torch_only
def test_layers_and_speculation_in_lanes(tiny: Model, alone: dict[str, Generated]) -> None:
    for setting in (EngineSettings(batch="layered"), EngineSettings(speculate="lookup", draft_control="always")):
        live = Live(tiny, replace(setting, lanes="fixed", lane_shares="70,80"), 4096, 48)
        assert live.run(requests(24, 60)) == alone
        assert live.most == 2


@torch_only
def test_a_failed_step_leaves_the_other_lane_alone(tiny: Model, alone: dict[str, Generated]) -> None:
    live = Live(tiny, EngineSettings(lanes="fixed"), 4096, 64)
    perform, failures = live.executor._perform, []

    def failing(plan: StepPlan, works: object) -> StepResult:
        if plan.lane == 0 and plan.step > 12 and not failures:
            failures.append(plan.step)
            raise RuntimeError("the device fell over")
        return perform(plan, works)  # type: ignore[arg-type]

    live.executor._perform = failing  # type: ignore[method-assign]
    got = live.run(requests(24, 60))
    assert failures
    whole = [name for name in alone if got[name] == alone[name]]
    assert 12 < len(whole) < 24
    for name in got.keys() - set(whole):  # they ended with the step
        tokens = got[name].token_ids
        assert tokens == alone[name].token_ids[: len(tokens)]
