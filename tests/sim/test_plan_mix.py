"""The cheapest mix: Mélange's example to the cent, a brute force over small cases, and queues that packing ignores."""

from __future__ import annotations

from itertools import product
from math import inf
from typing import Any

import pytest
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import BadSetting, EngineSettings
from headrace.core.types import SLO
from headrace.sim.plan import mix_told
from headrace.sim.plan.fleet_mix import confirm, dealt, highest
from headrace.sim.plan.mix import Bucket, Mix, NoMix, Type, pack, single
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.workload.settings import WorkloadSettings


def cheapest(types: list[Type], buckets: list[Bucket], slices: int) -> float:
    """Every way to send every slice somewhere."""
    best = inf
    pieces = [bucket for bucket in buckets for _ in range(slices)]
    for ways in product(range(len(types)), repeat=len(pieces)):
        if any(not piece.most[way] for piece, way in zip(pieces, ways, strict=True)):
            continue
        cost = 0.0
        for kind, one in enumerate(types):
            work = sum(p.rate / slices / p.most[kind] for p, way in zip(pieces, ways, strict=True) if way == kind)
            count = -int(-(work - 1e-9) // 1)
            cost += inf if one.available is not None and count > one.available else count * one.usd_per_hour
        best = min(best, cost)
    return best


def test_the_published_example() -> None:
    case: dict[str, Any] = golden("melange.json")["cases"][0]
    mix = pack(*mix_told.table(case["input"]))
    expected = case["expected"]
    counts = {one.name: count for one, count in zip(mix.types, mix.counts, strict=True)}
    assert counts == {"A10G": expected["A10G"], "A100-80GB": expected["A100-80GB"]}
    assert mix.usd_per_hour == pytest.approx(expected["cost"], abs=case["tolerance"]["cost_abs"])
    alone = golden("melange.json")["single_type_baselines_same_input"]
    types, buckets, _ = mix_told.table(case["input"])
    assert single(0, types, buckets) == alone["A10G_only"]["count"]
    assert single(1, types, buckets) == alone["A100_only"]["count"]


rates = st.floats(0.1, 9.0)
throughputs = st.sampled_from([0.0, 0.7, 1.3, 2.9, 7.1])
kinds = st.tuples(st.floats(0.3, 9.0), st.sampled_from([None, 1, 2, 5]))


@given(
    st.lists(kinds, min_size=1, max_size=3),
    st.lists(st.tuples(rates, throughputs, throughputs, throughputs), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_no_way_to_send_slices_is_cheaper(
    prices: list[tuple[float, int | None]], rows: list[tuple[float, ...]], slices: int
) -> None:
    types = [Type(f"t{at}", price, available) for at, (price, available) in enumerate(prices)]
    buckets = [Bucket(f"b{at}", row[0], row[1 : 1 + len(types)]) for at, row in enumerate(rows)]
    best = cheapest(types, buckets, slices)
    if best == inf:
        with pytest.raises(NoMix):
            pack(types, buckets, slices)
        return
    mix = pack(types, buckets, slices)
    assert mix.usd_per_hour == pytest.approx(best, rel=1e-6)
    for row, bucket in zip(mix.slices, buckets, strict=True):
        assert sum(row) == slices and all(not n or bucket.most[kind] for kind, n in enumerate(row))
    for kind, one in enumerate(types):
        assert mix.loads[kind] <= mix.counts[kind] + 1e-6
        assert one.available is None or mix.counts[kind] <= one.available


def test_more_slices_never_cost_more_and_fewer_types_never_less() -> None:
    types, buckets, _ = mix_told.table(golden("melange.json")["cases"][0]["input"])
    costs = [pack(types, buckets, slices).usd_per_hour for slices in (1, 2, 4, 8)]
    assert costs == sorted(costs, reverse=True)
    for kind in range(len(types)):
        one = [Bucket(bucket.name, bucket.rate, (bucket.most[kind],)) for bucket in buckets]
        assert pack(types[kind : kind + 1], one, 8).usd_per_hour >= costs[-1]


# -- with the simulator ------------------------------------------------------------------------------------------------

SITES = [SimulateSettings(model="llama-3.1-8b", hardware=name, attain=0.95) for name in ("L40S", "H100-SXM")]
SLO_ = SLO(ttft_s=2.0, tpot_s=0.06)


def scenario(rate: float) -> Scenario:
    traffic = WorkloadSettings(
        arrivals=f"poisson:{rate}", lengths="100:6000,20:200", requests=150, slo="ttft=2.0,tpot=0.06"
    )
    return Scenario(SITES[0], EngineSettings(inter_token_ms=60), (traffic,))


def test_a_device_serves_more_of_what_is_shorter_and_nothing_that_is_too_long() -> None:
    engine = EngineSettings()
    short, long = (highest(SITES[0], engine, prompt, 100, SLO_) for prompt in (200, 4000))
    assert short > long > 0
    assert highest(SITES[1], engine, 4000, 100, SLO_) > long
    assert highest(SITES[0], engine, 400_000, 100, SLO_) == 0
    assert highest(SITES[0], engine, 200, 100, SLO(tpot_s=1e-4)) == 0


def test_a_mix_is_simulated_and_loosened_until_it_holds() -> None:
    asked = scenario(12.0)
    found = confirm(list(asked.arrivals()), [Type("L40S", 1.8), Type("H100-SXM", 4.0)], SITES, asked, SLO_, 4)
    assert found.kept >= 0.95
    assert found.mix.usd_per_hour >= found.packed.usd_per_hour
    assert found.totals.completed + found.totals.rejected == 150
    assert "Simulated: " in mix_told.confirmed(found)


def test_every_request_goes_where_its_bucket_was_packed() -> None:
    arrivals = list(scenario(10.0).arrivals())
    sizes = len({(a.prompt_tokens, a.output_tokens) for a in arrivals})
    mix = Mix((Type("a", 1.0), Type("b", 1.0)), (1, 1), ((3, 1),) * sizes, (1.0, 1.0))
    parts = dealt(arrivals, mix)
    assert sum(map(len, parts)) == len(arrivals)
    assert len(parts[0]) / len(arrivals) == pytest.approx(0.75, abs=0.1)


# -- input -------------------------------------------------------------------------------------------------------------


def test_prices_and_availability_are_the_market_s() -> None:
    market = {"usd_per_hour": {"l4": 0.5}, "available": {"L4": 5}}
    (pair,) = mix_told.types(["2xL4"], market)
    assert pair == Type("2xL4", 1.0, 2)
    with pytest.raises(BadSetting, match="available"):
        mix_told.types(["L4"], {"available": {"L4": -1}})


@pytest.mark.parametrize("content", [[], {}, {"gpu_info": 3}, {"gpu_info": {"a": {"cost": "x"}}}])
def test_a_table_that_is_none_is_refused(content: object) -> None:
    with pytest.raises(BadSetting):
        mix_told.table(content)
