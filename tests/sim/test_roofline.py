"""The roofline: limits against closed forms, and steps taken apart by leaving parts of them out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from null_executor import NullExecutor

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.core.shape import ModelShape
from headrace.core.step import Run, StepPlan, StepResult
from headrace.sim.hardware import Device
from headrace.sim.roofline import parts
from headrace.sim.roofline.limits import ATTENTION, HEAD, LAYERS, Limits, Stored, machine
from headrace.sim.roofline.page import page
from headrace.sim.roofline.parts import BETWEEN, PREPARING, TooLarge, fitting, lengths
from headrace.sim.roofline.report import Prefill, Roofline, joined, table, to_json

SHAPE = ModelShape(30, 576, 9, 3, 64, 1536, 49152, 8192, tied_embedding=True)
WEIGHTS = SHAPE.layer_weights + SHAPE.vocab * SHAPE.hidden
SPEED = {"fp32": 480e9, "bf16": 1010e9, "int8": 2070e9}
CHIP: Device = machine("cpu", 24e9, 50e9, SPEED)
BF16 = Stored("bf16", 2 * WEIGHTS, "bf16", 2 * SHAPE.layers * SHAPE.kv_width)
Q4 = Stored("q4", 0.625 * WEIGHTS, "int8", SHAPE.layers * SHAPE.kv_width)
FP32 = Stored("fp32", 4 * WEIGHTS, "fp32", 4 * SHAPE.layers * SHAPE.kv_width)


def test_one_request_takes_as_long_as_its_bytes() -> None:
    for stored in (FP32, BF16, Q4):
        limit = Limits(SHAPE, CHIP, stored).decode(1, 256)
        nbytes = stored.weight_bytes + 257 * stored.kv_bytes_per_token
        assert limit.seconds == pytest.approx(nbytes / 50e9, rel=1e-6) and limit.bound == "memory"
        assert limit.parts[ATTENTION] == pytest.approx(257 * stored.kv_bytes_per_token / 50e9)


def test_many_take_as_long_as_their_multiplications() -> None:
    for stored, rate in ((FP32, "fp32"), (BF16, "bf16"), (Q4, "int8")):
        limit = Limits(SHAPE, CHIP, stored).decode(512, 0)
        assert limit.parts[LAYERS] == pytest.approx(512 * 2 * SHAPE.layer_weights / SPEED[rate])
        assert limit.parts[HEAD] == pytest.approx(512 * 2 * SHAPE.vocab * SHAPE.hidden / SPEED[rate])
        assert limit.bound == "compute"


def test_a_prompt_computes_one_head_and_its_own_pairs() -> None:
    limit = Limits(SHAPE, CHIP, FP32).prefill(1024)
    pairs = 1024 * 1025 / 2
    assert limit.parts[LAYERS] == pytest.approx(1024 * 2 * SHAPE.layer_weights / 480e9)
    assert limit.parts[HEAD] == pytest.approx(4 * SHAPE.vocab * SHAPE.hidden / 50e9)
    assert limit.parts[ATTENTION] == pytest.approx(SHAPE.layers * pairs * 4 * 9 * 64 / 480e9)
    assert limit.tokens_per_s == pytest.approx(1024 / limit.seconds)


@given(st.integers(1, 200), st.integers(0, 4000), st.sampled_from([FP32, BF16, Q4]))
def test_parts_add_up_and_more_work_takes_longer(rows: int, context: int, stored: Stored) -> None:
    limits = Limits(SHAPE, CHIP, stored)
    limit = limits.decode(rows, context)
    assert sum(limit.parts.values()) == pytest.approx(limit.seconds)
    assert limits.decode(rows + 1, context).seconds > limit.seconds * 0.999999
    assert limits.decode(rows, context + 1).seconds > limit.seconds
    assert limits.decode(rows + 1, context).tokens_per_s >= limit.tokens_per_s * 0.999999


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 300)), max_size=8),
    st.integers(0, 400),
    st.sampled_from([1, 3, 16]),
)
def test_what_is_measured_fits(points: list[tuple[int, int]], blocks: int, size: int) -> None:
    kept = fitting(points, Capacity(blocks, size, 250, 100))
    assert sum(-(-length // size) for length in lengths(kept)) <= blocks
    assert all(context % size == 0 and context < 250 for _, context in kept)
    assert all((rows, context // size * size) in kept or blocks < 2000 for rows, context in points)


LAYER_S, KEY_S, HEAD_S, STEP_S = 2e-3, 2e-6, 5e-3, 3e-3


@dataclass
class Priced:
    """An executor whose steps cost what this file says, so that the parts must come out; it checks plans as the
    executor within does."""

    inner: NullExecutor
    plans: list[StepPlan] = field(default_factory=list)

    @property
    def capacity(self) -> Capacity:
        return self.inner.capacity

    async def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if works := plan.work:
            first, last = works[0].layers or (0, self.capacity.layers)
            keys = sum(work.start for work in works) * (last - first)
            drawn = HEAD_S if any(work.sample for work in works) else 0.0
            await clock.sleep(STEP_S + LAYER_S * (last - first) + KEY_S * keys + drawn)
        return await self.inner.run(plan)

    def interrupt(self) -> Run | None:
        return None

    async def close(self) -> None:
        await self.inner.close()


def measured(blocks: int, points: list[tuple[int, int]]) -> tuple[tuple[parts.Reached, ...], dict[int, float], Priced]:
    executor = Priced(NullExecutor(Capacity(blocks, 16, 400, 50, layers=4), step_s=0.0))
    work = parts.measure(executor, EngineSettings(), 256, points, [40, 5000], rounds=2)
    reached, prefills = clock.run(work, virtual=True)
    return reached, dict(prefills), executor


def test_the_parts_of_a_step_come_out_by_leaving_them_out() -> None:
    reached, prefills, executor = measured(200, [(1, 64), (3, 64), (3, 160)])
    assert [(one.rows, one.context) for one in reached] == [(1, 64), (3, 64), (3, 160)]
    for one in reached:
        assert one.parts[HEAD] == pytest.approx(HEAD_S, rel=0.1)
        assert one.parts[PREPARING] == pytest.approx(STEP_S, rel=0.1)
        assert one.parts[LAYERS] == pytest.approx(4 * LAYER_S, rel=0.1)
        assert one.parts[ATTENTION] == pytest.approx(one.rows * one.context * 4 * KEY_S, rel=0.1)
        assert one.parts[BETWEEN] == pytest.approx(0.0, abs=1e-9)
    assert prefills == {40: pytest.approx(STEP_S + 4 * LAYER_S + HEAD_S)}
    assert not executor.inner.known, "the executor still knows requests"


def test_too_little_memory_is_said() -> None:
    with pytest.raises(TooLarge, match="--kv-memory"):
        measured(2, [(4, 64)])


def test_the_report_tells_what_is_lost() -> None:
    reached, prefills, _ = measured(200, [(1, 64), (3, 64)])
    limits = Limits(SHAPE, CHIP, BF16)
    decodes = joined([limits.decode(1, 64), limits.decode(3, 64), limits.decode(8, 64)], reached)
    found = Roofline("a model", 2, CHIP, 170e9, BF16, decodes, (Prefill(limits.prefill(40), prefills[40]),))
    assert [one.reached is not None for one in decodes] == [True, True, False]
    assert decodes[0].lost()[0][0] == HEAD and decodes[2].lost() == []
    text, stored = table(found), to_json(found)
    assert "50.0 GB/s" in text and "lost most to" in text and "head and sampling: " in text
    assert stored["decode"][0]["reached_s"] == pytest.approx(reached[0].seconds)
    assert stored["decode"][2]["reached_s"] is None
    shown = page(found)
    assert shown.count("<svg") == 1 and "a model" in shown and "http" not in shown.replace("http-equiv", "")
