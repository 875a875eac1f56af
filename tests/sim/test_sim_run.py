"""Whole simulations: what the statistics say against the events, how traffic is sent, and that nothing depends on the
process, the hash seed or the number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from sim_rig import MANY, Linear, Watched, traffic

from headrace.cluster.router import least_tokens
from headrace.cluster.view import ReplicaView
from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Admitted, Arrived, Finished
from headrace.core.ports import Capacity
from headrace.core.step import StepPlan
from headrace.core.types import SLO, FinishReason
from headrace.sim.apart import in_turns, simulate_apart
from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.executor import SimulatedExecutor
from headrace.sim.feed import NotApart
from headrace.sim.run import SimulationFailed, Site, simulate
from headrace.sim.sketch import RELATIVE_ERROR
from headrace.sim.stats import Stats
from headrace.workload.arrival import Arrival, Stretch

CAPACITY = Capacity(200, 4, 400, 100, MANY)
SITE = Site(EngineSettings(block_tokens=4), CAPACITY, Linear(), 64, replicas=3, slo=SLO(ttft_s=0.009, tpot_s=0.0066))


def test_statistics_are_those_of_the_tokens() -> None:
    watched = Watched(EngineSettings(block_tokens=4), replace(CAPACITY, blocks=60), 32)
    watched.stats = Stats(SLO(ttft_s=0.1, tpot_s=0.0068))
    watched.run(traffic(2, 80, 30.0, cancels=0.1))
    totals = watched.stats.totals
    done = [one for one in watched.events if isinstance(one, Finished) and one.usage.output_tokens]
    gaps = {name: [b - a for a, b in pairwise(at_s)] for name, at_s in watched.token_s.items()}
    completed = [one for one in done if one.reason in (FinishReason.STOP, FinishReason.LENGTH)]
    ttft = {one.request_id: watched.token_s[one.request_id][0] - one.arrival_s for one in completed}
    tpot = {
        one.request_id: sum(gaps[one.request_id]) / len(gaps[one.request_id])
        for one in completed
        if len(watched.token_s[one.request_id]) > 1
    }
    expected = {
        "ttft_s": list(ttft.values()),
        "tpot_s": list(tpot.values()),
        "itl_s": [gap for some in gaps.values() for gap in some],
        "longest_itl_s": [max(gaps[name]) for name in tpot],
        "e2e_s": [one.at_s - one.arrival_s for one in completed],
        "queue_s": [one.queue_s for one in watched.events if isinstance(one, Admitted) and not one.again],
    }
    for name, values in expected.items():
        sketch = getattr(totals, name)
        assert sketch.count == len(values), name
        assert sketch.sum == pytest.approx(sum(values)), name
        assert sketch.greatest == pytest.approx(max(values)), name
        middle = sorted(values)[(len(values) + 1) // 2 - 1]
        assert sketch.quantile(0.5) == pytest.approx(middle, rel=RELATIVE_ERROR * 1.001, abs=1e-9), name
    kept = [name for name in ttft if ttft[name] <= 0.1 and tpot.get(name, 0.0) <= 0.0068]
    assert totals.good == len(kept) < totals.completed == len(completed)
    assert totals.promised == totals.arrived == sum(isinstance(one, Arrived) for one in watched.events)
    assert totals.output_tokens == sum(one.usage.output_tokens for one in completed)
    assert totals.preemptions > 0
    assert totals.cached_tokens > 0


def test_load_is_spread_and_nothing_is_lost() -> None:
    shares = {}
    for dispatch in (None, least_tokens):
        report = simulate(traffic(3, 300, 30.0, longest=150), SITE, **({"dispatch": dispatch} if dispatch else {}))  # type: ignore[arg-type]
        totals = report.totals
        assert totals.completed + totals.rejected == totals.arrived == 300
        assert len(report.digests) == report.replicas == 3
        assert totals.per_second()["requests"] == pytest.approx(totals.completed / totals.span_s)
        assert 0 < totals.good < totals.completed
        shares[dispatch] = totals.ttft_s.mean
    assert shares[least_tokens] < 0.9 * shares[None], "looking at the load should help"  # type: ignore[operator]


def test_dispatchers_see_the_load_as_it_is() -> None:
    seen: list[list[ReplicaView]] = []

    def first(number: int, request: object, views: object) -> int:
        seen.append(list(views))  # type: ignore[call-overload]
        return 0

    simulate(
        [Arrival(at_s, (Stretch(10 + number),), 3) for number, at_s in enumerate((0.0, 0.001, 9.0))],
        SITE,
        dispatch=first,
    )
    assert [[(view.requests, view.prompt_tokens) for view in views] for views in seen] == [
        [(0, 0), (0, 0), (0, 0)],
        [(1, 10), (0, 0), (0, 0)],
        [(0, 0), (0, 0), (0, 0)],
    ]


def test_a_turn_waits_for_the_answer_before_it() -> None:
    turns = [
        Arrival(0.0, (Stretch(10, 1),), 50, session="a"),
        Arrival(0.1, (Stretch(10, 1), Stretch(50, 2, answer=True), Stretch(3, 3)), 5, session="a", turn=1, gap_s=0.1),
        Arrival(0.2, (Stretch(5, 9),), 5, session="b"),
        Arrival(5.0, (Stretch(70, 1),), 5, session="a", turn=2, gap_s=0.25),
        Arrival(7.0, (Stretch(70, 1),), 5, session="new", turn=3, gap_s=0.25),
    ]
    watched = Watched(EngineSettings(block_tokens=4), CAPACITY).run(turns)
    came = {one.request_id: one.at_s for one in watched.events if isinstance(one, Arrived)}
    went = {one.request_id: one.at_s for one in watched.events if isinstance(one, Finished)}
    assert came["1"] == pytest.approx(went["0"] + 0.1)
    assert came["2"] == 0.2
    assert came["3"] == 5.0, "its time had not come when the answer was done"
    assert came["4"] == 7.0, "the turn before it is not in this traffic"
    cached = {one.request_id: one.cached_tokens for one in watched.events if isinstance(one, Admitted)}
    assert cached["1"] >= 56, "the answer is found again: all blocks of 10 + 50 - 1 tokens but the last"


def test_clients_send_one_request_at_a_time() -> None:
    arrivals = [Arrival(None, (Stretch(10),), 20, gap_s=0.01) for _ in range(30)]
    watched = Watched(EngineSettings(block_tokens=4), CAPACITY).run(arrivals, clients=4)
    live, most = 0, 0
    for event in watched.events:
        live += isinstance(event, Arrived) - isinstance(event, Finished)
        most = max(most, live)
    assert most == 4
    assert watched.stats.totals.completed == 30


def test_processes_change_nothing() -> None:
    def arrivals() -> Iterator[Arrival]:
        return traffic(4, 200, 80.0, cancels=0.1)

    together = simulate(arrivals(), SITE, seed=4)
    for processes in (1, 2, 5):
        apart = simulate_apart(arrivals, SITE, processes=processes, seed=4)
        assert apart.digests == together.digests
        assert apart.totals.ttft_s.state() == together.totals.ttft_s.state()
        assert apart.totals.waiting.points() == together.totals.waiting.points()
        assert apart.totals.finished == together.totals.finished
        assert apart.totals.busy_s == together.totals.busy_s


@pytest.mark.parametrize("window", [1, 7, 10_000])
def test_windows_change_nothing(window: int) -> None:
    together = simulate(traffic(5, 150, 200.0), SITE)
    parts = in_turns(traffic(5, 150, 200.0), SITE, range(1, 3), window)
    assert tuple(part.digest for part in parts) == together.digests[1:3]
    assert in_turns([], SITE, range(3), window)[0].totals.arrived == 0


def test_what_goes_wrong_in_a_window_is_said() -> None:
    broken = replace(SITE, cost=Broken())
    with pytest.raises(SimulationFailed, match="broken"):
        in_turns(traffic(5, 20, 200.0), broken, range(3), 2)


class Broken:
    """A price that cannot be told."""

    def estimate(self, batch: Batch) -> StepCost:
        raise RuntimeError("broken")

    def line(self, batch: Batch, steps: int) -> Line:
        raise RuntimeError("broken")


def test_who_does_not_think_is_in_the_next_step() -> None:
    """A client that sends again as soon as it has its answer meets an idle replica."""
    arrivals = [Arrival(None, (Stretch(10),), 3, gap_s=0.0) for _ in range(5)]
    watched = Watched(EngineSettings(block_tokens=4), CAPACITY).run(arrivals)
    assert {one.queue_s for one in watched.events if isinstance(one, Admitted)} == {0.0}
    assert watched.stats.totals.steps == 5 * 3 + 1  # the last tells the executor whom to forget


def test_traffic_that_waits_stays_together() -> None:
    def turns() -> list[Arrival]:
        return [Arrival(0.0, (Stretch(5),), 5, session="a"), Arrival(1.0, (Stretch(5),), 5, session="a", gap_s=1.0)]

    with pytest.raises(NotApart, match="ties the replicas together"):
        simulate_apart(turns, SITE, processes=2)
    assert simulate(turns(), SITE).totals.completed == 2


PRINT = """
import sys; sys.path.insert(0, sys.argv[1])
from test_sim_run import SITE, simulate, traffic
print(simulate(traffic(9, 100, 50.0, cancels=0.2), SITE, seed=9).digest)
"""


def test_the_digest_is_the_same_in_every_process() -> None:
    here = str(Path(__file__).parent)
    seen = set()
    for seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = [sys.executable, "-c", PRINT, here]
        seen.add(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout)
    assert seen == {simulate(traffic(9, 100, 50.0, cancels=0.2), SITE, seed=9).digest + "\n"}
    assert seen != {simulate(traffic(8, 100, 50.0, cancels=0.2), SITE, seed=9).digest + "\n"}


def test_a_cost_model_that_refuses_ends_the_simulation() -> None:
    class Refusing(Linear):
        def estimate(self, batch: Batch) -> StepCost:
            raise ArithmeticError("too far from anything measured")

    with pytest.raises(SimulationFailed, match="too far from anything measured"):
        simulate(traffic(1, 10, 10.0), replace(SITE, cost=Refusing()))


def test_traffic_that_cannot_be_read_ends_the_simulation() -> None:
    def broken() -> Iterator[Arrival]:
        yield from traffic(1, 10, 10.0)
        raise ValueError("line 11 is no request")

    with pytest.raises(ValueError, match="line 11"):
        simulate(broken(), SITE)


def test_real_clocks_are_refused() -> None:
    executor = SimulatedExecutor(CAPACITY, Linear(), {})
    with pytest.raises(RuntimeError, match="virtual=True"):
        clock.run(executor.run(StepPlan(0, ())))
    clock.run(executor.run(StepPlan(0, ())), virtual=True)


def test_memory_is_bounded_by_what_is_in_flight() -> None:
    watched = Watched(EngineSettings(block_tokens=4), CAPACITY).run(traffic(6, 400, 20.0))
    assert not watched.feed.lengths
    assert not watched.feed._session_of
    assert not watched.stats._slos
    assert not watched.stats._gaps._last
    assert len(watched.executor._ends) < 60
    assert len(watched.stats._gaps._numbers) < 60
    assert json.dumps(watched.stats.totals.ttft_s.state())
