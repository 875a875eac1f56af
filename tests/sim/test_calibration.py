"""Measuring an engine whose steps follow a known law, in virtual time; the stored form; and every way to damage it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core import clock
from headrace.core.config import BadSetting, Bytes, EngineSettings
from headrace.core.ports import Capacity
from headrace.core.shape import ModelShape
from headrace.core.step import Run, StepPlan, StepResult
from headrace.sim.calibration import (
    FORMAT,
    BadCalibration,
    Calibration,
    Fitted,
    Origin,
    Point,
    fit_best,
    load,
    store,
)
from headrace.sim.cost.batch import Batch, CostModel, Extrapolated, Line, StepCost, batch_of
from headrace.sim.cost.fit import BadSamples, relative_errors
from headrace.sim.cost.linear import Linear
from headrace.sim.cost.tiled import Sizes, Tiled
from headrace.sim.executor import SimulatedExecutor
from headrace.sim.measure import (
    DECODE_STEPS,
    MeasuringFailed,
    Session,
    Step,
    design,
    documents,
    grouped,
    host_seconds,
    probing,
)
from headrace.sim.run import simulate
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.workload.settings import WorkloadSettings, workload

CAPACITY = Capacity(blocks=2000, block_tokens=16, max_context_tokens=2048, vocab=300)
SETTINGS = EngineSettings(max_running=16)
SIZES = (4, 8, 16, 24, 32, 64, 128, 256)
TILED = Tiled(
    Sizes(SIZES), (0.07, 0.004, 0.015, 0.002, 3e-3, 1.5e-3, 1.7e-3, 2e-3, 4e-4, 5e-4, 4e-6, 3e-5, 1e-3, 2e-6, 3e-8)
)
LINEAR = Linear(2e-2, 1e-3, 1e-7, 5e-6, 1e-4)
SHAPE = ModelShape(2, 32, 2, 2, 16, 48, 300, 2048)
ORIGIN = Origin("tiny", SHAPE, "fp32", "cpu", 2, "a processor", {"headrace": "0", "torch": "2"}, "2026-11-21T07:00:00")


class Noisy:
    """A law whose every answer is a little off."""

    def __init__(self, law: CostModel, noise: float) -> None:
        self.law, self.noise, self.random = law, noise, Random(1)

    def estimate(self, batch: Batch) -> StepCost:
        cost = self.law.estimate(batch)
        return cost._replace(seconds=cost.seconds * self.random.gauss(1, self.noise))

    def line(self, batch: Batch, steps: int) -> Line:
        return Line(self.estimate(batch).seconds, 0.0, 1)


class Failing:
    """An executor that computes a few steps and no more."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.inner = SimulatedExecutor(CAPACITY, LINEAR, defaultdict(lambda: 1 << 30))

    @property
    def capacity(self) -> Capacity:
        return CAPACITY

    async def run(self, plan: StepPlan) -> StepResult:
        self.left -= 1
        if self.left < 0:
            raise OSError("the device is gone")
        return await self.inner.run(plan)

    def interrupt(self) -> Run | None:
        return self.inner.interrupt()

    async def close(self) -> None:
        await self.inner.close()


def measure(law: CostModel, rounds: int = 1, rows: int = 12) -> list[Step]:
    """Virtual hours of measuring in some seconds."""
    lengths: dict[str, int] = defaultdict(lambda: 1 << 30)
    executor = SimulatedExecutor(CAPACITY, law, lengths)

    async def main() -> list[Step]:
        async with probing(executor, SETTINGS, 128) as prober:
            await prober.prepare(documents(design(rows, 256, 128)))
            for _ in range(rounds):
                for number, session in enumerate(design(rows, 256, 128)):
                    await prober.session(session, number)
        return [step for step in prober.watch.steps if step.label is not None]

    return clock.run(main(), virtual=True)


def calibrated(law: CostModel, rounds: int = 1) -> Calibration:
    steps = measure(law, rounds)
    measured = grouped(steps)
    fitted, errors = fit_best([one.sample for one in measured], SIZES)
    points = tuple(map(Point.of, measured))
    host_s = host_seconds(steps)
    return Calibration(FORMAT, ORIGIN, CAPACITY, 128, SETTINGS, SIZES, host_s, points, fitted, errors)


@pytest.fixture(scope="module")
def exact() -> Calibration:
    return calibrated(TILED)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_the_steps_that_were_designed_are_those_that_are_measured() -> None:
    lengths: dict[str, int] = defaultdict(lambda: 1 << 30)

    async def main() -> list[Step]:
        async with probing(SimulatedExecutor(CAPACITY, LINEAR, lengths), SETTINGS, 128) as prober:
            await prober.prepare([256] * 5)
            await prober.session(Session((256, 128, 64), (((32, 50),), ((0, 20), (0, 30)))), 7)
        return [step for step in prober.watch.steps if step.label is not None]

    steps = clock.run(main(), virtual=True)
    assert {step.label for step in steps} == {7}
    decodes = [step for step in steps if step.batch.tokens == step.batch.decodes == 3]
    assert len(decodes) >= DECODE_STEPS and decodes[0].batch.full.decode_context == 256 + 128 + 64 + 3
    assert decodes[0].batch.longest == 257
    mixed = [step.batch for step in steps if step.batch.tokens > step.batch.decodes]
    assert [(batch.rows, batch.tokens, batch.sampled) for batch in mixed] == [(4, 53, 4), (5, 53, 5)]
    assert mixed[0].full.prefill_context == 32 + 50
    for step in steps:
        assert step.seconds == pytest.approx(LINEAR.estimate(step.batch).seconds) and step.host_s == 0


def test_a_design_covers_what_it_was_asked_to() -> None:
    sessions = design(32, 512, 128)
    assert max(len(session.contexts) for session in sessions) == 32
    assert {len(session.contexts) for session in sessions} >= {0, 1, 4, 16}
    assert max(max(session.contexts, default=0) for session in sessions) == 512
    prompts = [prompt for session in sessions for probe in session.probes for prompt in probe]
    assert max(tokens for _, tokens in prompts) == 128 and max(start for start, _ in prompts) == 512
    shapes = {(step.batch.rows, step.batch.tokens, step.batch.sampled) for step in measure(LINEAR, rows=16)}
    assert len(shapes) >= 30


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 9])
def test_a_failing_engine_is_said_to_fail(steps: int) -> None:
    """While the cache is filled, while requests decode, and while a probe waits."""

    async def main() -> None:
        async with probing(Failing(steps), SETTINGS, 128) as prober:
            await prober.prepare([64])
            await prober.session(Session((64, 64), (((0, 8),), ((0, 30),), ((0, 9),))), 0)

    with pytest.raises(MeasuringFailed, match="the device is gone"):
        clock.run(main(), virtual=True)


# -- fitting -----------------------------------------------------------------------------------------------------------


def test_a_tiled_engine_is_recognised(exact: Calibration) -> None:
    assert exact.fitted.kind == "tiled" and exact.errors["tiled"].worst < 1e-3 < exact.errors["linear"].mean
    fresh = [batch_of([(start, 1) for start in range(20, 20 + 15 * rows, 15)], rows) for rows in range(1, 13)]
    for batch in fresh:
        assert exact.cost().estimate(batch).seconds == pytest.approx(TILED.estimate(batch).seconds, rel=1e-3)


def test_noise_is_averaged_out() -> None:
    noisy = calibrated(Noisy(TILED, 0.03), rounds=3)
    assert noisy.fitted.kind == "tiled" and 0.005 < noisy.errors["tiled"].mean < 0.05
    truth = [replace(sample, seconds=TILED.estimate(sample.batch).seconds) for sample in noisy.samples]
    misses = relative_errors(noisy.cost(), truth)
    assert sum(map(abs, misses)) / len(misses) < 0.015


def test_a_linear_engine_is_fitted_exactly_too() -> None:
    found = calibrated(LINEAR)
    assert found.errors[found.fitted.kind].worst < 1e-3


def test_too_few_points_for_any_model() -> None:
    with pytest.raises(BadSamples, match="measure more"):
        fit_best([], SIZES)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiled", "linear", "regimes", "table"])
def test_what_is_stored_comes_back(exact: Calibration, kind: str, tmp_path: Path) -> None:
    counts = {"tiled": exact.fitted.coefficients, "linear": (0.01,) * 5, "regimes": (0.01,) * 10, "table": ()}
    kept = msgspec.structs.replace(exact, fitted=Fitted(kind, counts[kind]))
    store(kept, tmp_path / "new" / "c.json")
    found = load(tmp_path / "new" / "c.json")
    assert found == kept and type(found.cost()) is type(kept.cost())
    for sample in found.samples[:20]:
        assert found.cost().estimate(sample.batch) == kept.cost().estimate(sample.batch)


def test_a_stored_calibration_simulates_as_the_law_does(exact: Calibration, tmp_path: Path) -> None:
    store(exact, tmp_path / "c.json")
    traffic = WorkloadSettings("poisson:2", "16:100,4:20", requests=60)
    site = load(tmp_path / "c.json").site()
    assert (site.capacity, site.token_budget, site.settings) == (CAPACITY, 128, SETTINGS)
    found, true = (simulate(workload(traffic), one).totals for one in (site, replace(site, cost=TILED)))
    assert found.e2e_s.mean == pytest.approx(true.e2e_s.mean, rel=1e-3) and found.completed == true.completed == 60
    with pytest.raises(BadSetting, match="copies to the host"):
        tiered = replace(SETTINGS, host_kv_memory=Bytes(1 << 30))
        Scenario(SimulateSettings(calibration=tmp_path / "c.json"), tiered).site()


def test_nothing_is_extrapolated_silently(exact: Calibration) -> None:
    low, high = exact.range()["context"]
    assert (low, high) == (0, max(point.decode_context for point in exact.points))
    outside = batch_of([(int(high), 1)] * 2, 2)
    assert exact.cost().estimate(outside).extrapolated
    with pytest.raises(Extrapolated):
        exact.cost(strict=True).estimate(outside)
    with pytest.raises(Exception, match="outside what was measured"):
        simulate(workload(WorkloadSettings("poisson:1", "1500,10", requests=3)), exact.site(strict=True))


def damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(tree: dict[str, Any]) -> dict[str, Any]:
        change(tree)
        return tree

    return apply


DAMAGE = {
    "format 1": damaged(lambda tree: tree.update(format=2)),
    "missing required field `points`": damaged(lambda tree: tree.pop("points")),
    "no measured points": damaged(lambda tree: tree.update(points=[])),
    "unknown field": damaged(lambda tree: tree.update(more=1)),
    "Expected `int`": damaged(lambda tree: tree["capacity"].update(blocks="many")),
    "at least 1": damaged(lambda tree: tree["capacity"].update(blocks=0)),
    "negative, not finite": damaged(lambda tree: tree["points"][0].update(seconds=-1.0)),
    "no time": damaged(lambda tree: tree["points"][3].update(seconds=0.0)),
    "absurdly large": damaged(lambda tree: tree["points"][3].update(tokens=1e300)),
    "do not ascend": damaged(lambda tree: tree.update(row_sizes=[8, 4])),
    "not those of the model": damaged(lambda tree: tree["fitted"]["coefficients"].pop()),
    "not those of the model 'magic'": damaged(lambda tree: tree["fitted"].update(kind="magic")),
    "would take no time": damaged(lambda tree: tree["fitted"].update(coefficients=[0.0] * 15)),
}


@pytest.mark.parametrize("expected", DAMAGE)
def test_every_damage_is_named(exact: Calibration, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(DAMAGE[expected](json.loads(msgspec.json.encode(exact)))))
    with pytest.raises(BadCalibration, match=r"calibrate again") as raised:
        load(path)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000, b'{"format": {}}']
)
def test_what_is_not_a_calibration_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(BadCalibration):
        load(tmp_path / "c.json")
    with pytest.raises(BadCalibration, match="headrace calibrate"):
        load(tmp_path / "missing.json")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "c.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadCalibration, match="larger than"):
        load(tmp_path / "c.json")


def test_a_place_that_cannot_be_written_is_named(exact: Calibration, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadCalibration, match="cannot write"):
        store(exact, tmp_path / "file" / "c.json")


@given(data=st.data())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_any_change_of_a_byte_loads_or_is_refused(
    exact: Calibration, data: st.DataObject, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    content = bytearray(msgspec.json.encode(exact))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = load(path)
    except BadCalibration:
        return
    assert all(found.cost().estimate(sample.batch).seconds > 0 for sample in found.samples)
