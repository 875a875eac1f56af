"""Fleets by formulas: the published tables to the printed digit, textbook queues, and what simulation says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, factorial, inf

import pytest
from golden import FOLDER, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import BadSetting, EngineSettings
from headrace.sim.plan import fleet
from headrace.sim.plan.pools import (
    NoFleet,
    Profile,
    Service,
    drawn,
    erlang_c,
    kusd_per_year,
    provisioned,
    sized,
    split,
    split_cdf,
    watts,
)
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.workload.settings import WorkloadSettings

DATA = golden("fleetsim_planner.json")
LMSYS = DATA["pareto_lmsys_A100"]
ROWS = [dict(zip(LMSYS["cols"], row, strict=True)) for row in LMSYS["rows"]]


def published(name: str) -> Profile:
    one = DATA["profiles"][name]
    return Profile(one["W"], one["H"], one["chunk"], one["total_kv_blks"], one["max_slots"], one["blk_size"])


A100 = published("A100_80GB")


def lmsys() -> list[tuple[int, float]]:
    path = FOLDER.parent / "traces" / "fleetsim_lmsys_cdf.json"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return [(tokens, share) for tokens, share in json.loads(path.read_text())]


def test_slots() -> None:
    assert {str(context): A100.slots(int(context)) for context in DATA["n_slots_A100"]} == DATA["n_slots_A100"]


def test_one_pool_for_lmsys() -> None:
    context = LMSYS["long_max_ctx"]
    found = sized(A100, drawn(lmsys(), high=context), LMSYS["lam"], LMSYS["slo_ms"] / 1e3, context)
    assert found.devices == LMSYS["homo"]["gpus"]
    cost = DATA["profiles"]["A100_80GB"]["cost"]
    assert kusd_per_year(found.devices, cost) == pytest.approx(LMSYS["homo"]["kusd_yr"], abs=0.5)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"split-{row['B_short']}")
def test_two_pools_for_lmsys(row: dict[str, float]) -> None:
    found = split_cdf(A100, lmsys(), LMSYS["lam"], LMSYS["slo_ms"] / 1e3, int(row["B_short"]), LMSYS["long_max_ctx"])
    assert (found.short.devices, found.long.devices, found.devices) == (row["n_s"], row["n_l"], row["gpus"])
    assert kusd_per_year(found.devices, 2.21) == pytest.approx(row["kusd_yr"], abs=0.5)
    assert 100 * (1 - found.devices / LMSYS["homo"]["gpus"]) == pytest.approx(row["saving_pct"], abs=0.05)
    assert round(1e3 * found.short.ttft_s) == row["p99_short_ms"]
    assert round(1e3 * found.long.ttft_s) == row["p99_long_ms"]


def test_the_recommended_threshold_is_the_cheapest_with_the_shortest_wait() -> None:
    found = [split_cdf(A100, lmsys(), 100, 0.5, int(row["B_short"]), 65_536) for row in ROWS]
    best = min(found, key=lambda one: (one.devices, one.long.ttft_s))
    assert best.threshold == LMSYS["recommended_B_short"]


@given(st.integers(1, 40), st.floats(0.05, 0.98))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_erlang_c_is_the_textbook_sum(servers: int, busy: float) -> None:
    load = servers * busy
    last = load**servers / factorial(servers) / (1 - busy)
    textbook = last / (sum(load**k / factorial(k) for k in range(servers)) + last)
    assert erlang_c(servers, load) == pytest.approx(textbook, rel=1e-9)


@given(st.floats(1.0, 400.0), st.floats(0.01, 2.0))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_more_traffic_never_needs_fewer_devices(rate: float, slo_s: float) -> None:
    service = Service.of(A100, [(400, 100), (3000, 400)], 8192)
    count = service.devices(rate, slo_s)
    assert service.wait_s(count, rate) <= slo_s and rate <= 0.851 * count * service.per_s
    assert service.devices(1.2 * rate, slo_s) >= count
    assert service.devices(rate, slo_s / 2) >= count
    assert service.wait_s(1, 2 * service.per_s) == inf


def test_parts_of_a_fleet_add_up() -> None:
    pairs = [(100, 50)] * 9 + [(6000, 500)]
    found = split(A100, pairs, 50, 0.5, 1000, 8192)
    assert found is not None
    assert found.short.rate + found.long.rate == pytest.approx(50)
    assert split(A100, pairs, 50, 0.5, 10_000, 8192) is None
    with pytest.raises(NoFleet):
        sized(A100, pairs, 50, 0.5, 2_000_000)


def test_availability_and_power() -> None:
    assert provisioned(100, 0.0, 1.0) == 100 and provisioned(100, 0.01, 2.0) == 102
    one = DATA["profiles"]["H100_80GB"]
    full = watts(one["p_idle"], one["p_nom"], one["k"], one["x0"], 2 ** one["x0"])
    assert full == pytest.approx((one["p_idle"] + one["p_nom"]) / 2)
    assert watts(300, 600, 1.0, 4.2, 128) == pytest.approx(300 + 300 / (1 + exp(-(7 - 4.2))))
    assert watts(300, 600, 1.0, 4.2, 0) == 300


# -- with the simulator ------------------------------------------------------------------------------------------------


def scenario(slo: str = "ttft=1.0") -> Scenario:
    traffic = WorkloadSettings(arrivals="poisson:10", lengths="64:900@90+4000:7000@10,20:120", requests=200, slo=slo)
    simulate = SimulateSettings(model="llama-3.1-8b", hardware="L40S", attain=0.95)
    return Scenario(simulate, EngineSettings(), (traffic,))


def test_a_fleet_is_sized_and_its_slice_simulated() -> None:
    found = fleet.fleet(scenario(), 100.0, 1.0)
    assert found.one.devices * found.one.service.per_s >= 100 / 0.85
    (name, (pool,)), *_ = found.checked
    assert name == "one pool" and pool.kept >= 0.95
    assert pool.replicas <= pool.formula or pool.first_kept < 0.95
    said = fleet.answer(found, 100.0, scenario(), fleet.swings_of(scenario(), 100.0, found))
    assert said.headline[0].startswith("RECOMMENDED") and "simulated, one pool" in said.headline[1]
    assert min(said.numbers["ten_percent_off"].values()) >= 0.9 * pool.replicas  # type: ignore[attr-defined]
    assert said.plan is not None and 'dispatch = "least-tokens"' in said.plan


def test_prompts_slow_the_steps_they_share() -> None:
    """A device that computes prompts beside answers does fewer of both: exactly their share of its time."""
    pairs = [(1000, 100)] * 3
    plain = Service.of(A100, pairs, 8192)
    priced = Service.of(replace(A100, prompt_token_s=1e-4), pairs, 8192)
    steps, added_s = 2 + 100, plain.slots * 1000 * 1e-4
    assert 1 / priced.per_s == pytest.approx(1 / plain.per_s + added_s / plain.slots, rel=1e-9)
    assert priced.prefill_s == pytest.approx(plain.prefill_s + 0.1)
    assert A100.steps(pairs[0]) == steps


def test_a_large_fleet_is_a_small_one_many_times() -> None:
    """The slice sees the same load, so the answer grows with the rate."""
    small, large = (fleet.fleet(scenario(), rate, 1.0) for rate in (100.0, 2_000.0))
    ratio = large.one.devices / small.one.devices
    assert 15 < ratio <= 20.5


def test_a_fleet_needs_a_promise_that_can_be_kept() -> None:
    with pytest.raises(BadSetting, match="ttft"):
        fleet.needs_slo(None)
    with pytest.raises(NoFleet, match="without any queue"):
        fleet.checked_pool(scenario("ttft=0.001"), list(scenario("ttft=0.001").arrivals()), 1.0, 4)
