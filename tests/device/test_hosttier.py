"""KV that went to the host and came back is the same KV: tokens and log-probabilities do not tell whether a request was
preempted by swap, at whatever moment, or found the copies of an earlier turn."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import BLOCK_TOKENS, Generated, Model, Rig, request

from headrace.core.config import EngineSettings, parse_bytes
from headrace.core.ports import least_copied_blocks
from headrace.core.shape import ModelShape
from headrace.core.step import DEVICE, HOST, Copy, StepPlan
from headrace.core.types import Request, Sampling
from headrace.device.hosttier import HostTier, seconds
from headrace.device.kvstore import KVStore, block_bytes
from headrace.device.memory import DoesNotFit, host_blocks

SHAPE = ModelShape(2, 8, 2, 2, 4, 16, 50, 64)
SWAP = EngineSettings(ordering="random", preemption="swap", priority_updates=0.5)


def requests(count: int = 20, shared: int = 70) -> list[Request]:
    rng = random.Random(count)
    prefix = [rng.randrange(500) for _ in range(shared)]
    samplings = (Sampling(temperature=0, logprobs=2), Sampling(temperature=0.9, seed=5, top_p=0.9, logprobs=2))
    return [
        request(
            f"r{number}",
            prefix[: shared * (number % 2)] + [rng.randrange(500) for _ in range(rng.randrange(1, 120))],
            rng.randrange(4, 40),
            samplings[number % 2],
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def alone(tiny: Model) -> dict[str, Generated]:
    plain = EngineSettings(prefix_cache=False)
    return {one.id: Rig(tiny, settings=plain).run([one])[one.id] for one in requests()}


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("batch", ["chunked", "layered", "prefill-first"])
def test_swapped_or_not(tiny: Model, alone: dict[str, Generated], batch: str, prefix_cache: bool) -> None:
    chosen = replace(SWAP, batch=batch, prefix_cache=prefix_cache)
    rig = Rig(tiny, blocks=36, budget=64, settings=chosen, host_blocks=400)
    assert rig.run(requests()) == alone
    assert rig.preemptions > 10
    assert min(rig.copied.values()) > 20


def test_swapped_at_any_moment(tiny: Model, alone: dict[str, Generated]) -> None:
    """Everybody who may is thrown out, every few steps, whether memory is short or not."""
    rig = Rig(tiny, blocks=400, budget=64, settings=EngineSettings(prefix_cache=False), host_blocks=400)
    rng = random.Random(3)

    def throw_out(step: int) -> None:
        if rng.random() < 0.3:
            for progress in rig.scheduler._lines.running():
                if rng.random() < 0.5:
                    rig.scheduler._planner.preempt(progress, rig.now, "on purpose")
            rig.scheduler.check()

    assert rig.run(requests(), throw_out) == alone
    assert rig.copied[DEVICE] > 100
    assert rig.copied[HOST] < rig.copied[DEVICE], "a block was copied out twice"


@pytest.mark.parametrize("few", [5, 30])
def test_a_host_tier_that_is_too_small_only_costs_time(tiny: Model, alone: dict[str, Generated], few: int) -> None:
    rig = Rig(tiny, blocks=36, budget=64, settings=SWAP, host_blocks=few)
    assert rig.run(requests()) == alone
    assert rig.copied[HOST] > 20


def test_an_earlier_turn_is_found_on_the_host(tiny: Model) -> None:
    greedy = Sampling(temperature=0, logprobs=2)
    ids = [*range(100)]
    rig = Rig(tiny, blocks=32, host_blocks=200)
    first = rig.run([request("one", ids, 12, greedy)])["one"]
    rig.run([request("others", [7] * 500, 2, greedy)])  # takes all of the device's memory
    second = request("two", [*ids, *first.token_ids, 5, 6, 7], 20, greedy)
    assert rig.run([second])["two"] == Rig(tiny, settings=EngineSettings(prefix_cache=False)).run([second])["two"]
    assert rig.copied[DEVICE] == 6  # full blocks of the 111 tokens that the first turn computed


def test_an_executor_without_a_tier_says_so(tiny: Model) -> None:
    with pytest.raises(RuntimeError, match="does not have"):
        tiny.executor(8).step(StepPlan(0, (), copies=(Copy(DEVICE, HOST, ((0, 0),)),)))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_any_copies_move_whole_blocks_and_nothing_else(data: st.DataObject) -> None:
    store = KVStore(SHAPE, 9, BLOCK_TOKENS, np.dtype("<f4"))
    for plane in (*store.keys, *store.values):
        plane[:] = np.random.default_rng(1).random(plane.shape)
    tier = HostTier(store, 150)
    before = [plane.copy() for plane in (*store.keys, *store.values)]
    count = data.draw(st.integers(1, 8))
    sources = data.draw(st.permutations(range(9)))[:count]
    on_host = sorted(data.draw(st.lists(st.integers(0, 149), min_size=count, max_size=count, unique=True)))
    targets = data.draw(st.permutations(range(9)))[:count]
    out = Copy(DEVICE, HOST, tuple(zip(sources, on_host, strict=True)))
    into = Copy(HOST, DEVICE, tuple(zip(on_host, targets, strict=True)))
    tier.begin(StepPlan(0, (), copies=(out, into)))
    tier.end()
    moved = dict(zip(targets, sources, strict=True))
    for plane, old in zip((*store.keys, *store.values), before, strict=True):
        for block in range(9):
            here, there = (slice(at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS) for at in (block, moved.get(block, block)))
            assert np.array_equal(plane[:, here], old[:, there])


def test_long_runs_are_cut() -> None:
    store = KVStore(SHAPE, 140, BLOCK_TOKENS, np.dtype("<f4"))
    store.keys[1][:] = np.random.default_rng(1).random(store.keys[1].shape)
    tier, before = HostTier(store, 140), store.keys[1].copy()
    same = tuple((at, at) for at in range(140))
    tier.begin(StepPlan(0, (), copies=(Copy(DEVICE, HOST, same),)))
    store.keys[1][:] = 0
    tier.begin(StepPlan(1, (), copies=(Copy(HOST, DEVICE, same),)))
    assert np.array_equal(store.keys[1], before)
    assert seconds(tier, 8) > 0
    assert tier.nbytes == 140 * block_bytes(SHAPE, BLOCK_TOKENS, 4)


def test_a_tier_larger_than_the_host_is_refused_with_what_would_do() -> None:
    with pytest.raises(DoesNotFit, match=r"--host-kv-memory from 1\.0 MiB"):
        host_blocks(parse_bytes("900TiB"), 1 << 20)
    with pytest.raises(DoesNotFit):
        host_blocks(1000, 1 << 20)
    assert host_blocks(5 << 20, 1 << 20) == 5


@pytest.mark.parametrize(
    ("copies_s", "copied_s", "computed_s", "least"), [(0.0, 1.0, 2.0, 1), (5.0, 1.0, 2.0, 6), (0.0, 2.0, 2.0, 1 << 40)]
)
def test_the_fewest_blocks_worth_a_copy(copies_s: float, copied_s: float, computed_s: float, least: int) -> None:
    assert least_copied_blocks(copies_s, copied_s, computed_s) == least
