"""Who is started and who is stopped, by property; how long a start takes, by arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.cluster.scaling import ColdStart, Scaling
from headrace.cluster.view import ReplicaView

views = st.lists(
    st.tuples(st.integers(0, 5), st.booleans(), st.floats(0, 200)).map(
        lambda drawn: ReplicaView(0, requests=drawn[0] if drawn[1] else 0, ready=drawn[1], idle_s=drawn[2])
    ),
    max_size=6,
).map(
    lambda found: [
        ReplicaView(at, requests=view.requests, ready=view.ready, idle_s=0.0 if view.requests else view.idle_s)
        for at, view in enumerate(found)
    ]
)
rules = st.builds(
    lambda requests, least, more, keep: Scaling(requests, least, least + more, keep),
    st.floats(0.5, 8),
    st.integers(0, 3),
    st.integers(0, 5),
    st.floats(0, 150),
)


@given(rules, st.integers(0, 30), views)
@bounded(max_examples=150, derandomize=True, deadline=None)
def test_the_fleet_stays_within_its_bounds(rule: Scaling, waiting: int, fleet: list[ReplicaView]) -> None:
    starts, stops = rule.starts(waiting, fleet), rule.stops(fleet)
    assert rule.least <= rule.wanted(waiting, fleet) <= max(rule.most, rule.least)
    assert starts == 0 or len(fleet) + starts <= rule.most
    assert not stops or len(fleet) - len(stops) >= rule.least
    for replica in stops:
        view = fleet[replica]
        assert view.ready and not view.requests and view.idle_s >= rule.keep_alive_s
    kept = [view for view in fleet if view.ready and not view.requests and view.replica not in stops]
    assert all(view.idle_s <= min((fleet[one].idle_s for one in stops), default=1e9) for view in kept)


@given(rules, st.integers(0, 30), views)
@bounded(max_examples=80, derandomize=True, deadline=None)
def test_more_load_never_wants_fewer(rule: Scaling, waiting: int, fleet: list[ReplicaView]) -> None:
    assert rule.wanted(waiting + 1, fleet) >= rule.wanted(waiting, fleet)
    busy = [ReplicaView(view.replica, requests=view.requests + 1) for view in fleet]
    assert rule.wanted(waiting, busy) >= rule.wanted(waiting, fleet)
    assert rule.stops(busy) == ()


def test_one_request_wakes_a_fleet_of_none() -> None:
    rule = Scaling(4.0, 0, 3)
    assert rule.starts(0, []) == 0 and rule.starts(1, []) == 1 and rule.starts(9, []) == 3
    assert rule.starts(1, [ReplicaView(0, ready=False)]) == 0, "one is on its way"
    assert not rule.fixed and Scaling(4.0, 2, 2).fixed


def test_a_cold_start_is_process_weights_and_warming() -> None:
    disk = ColdStart(16e9, 1, 2e9, 25e9, process_s=5, warm_s=3)
    assert disk.load_s == pytest.approx(8) and disk.seconds == pytest.approx(16)
    assert ColdStart(140e9, 4, 200e9, 25e9).load_s == pytest.approx(1.4), "the links of four devices are the slower way"
