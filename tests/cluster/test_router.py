"""Every router by property: it picks somebody who is there, and what it promises to pick."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.cluster.router import ROUTES, Route, least_requests, least_tokens, prefix, round_robin, two_choices
from headrace.cluster.view import ReplicaView
from headrace.core.types import Blank, Request

REQUEST = Request("r", (Blank(100),), 0.0, 10)

fleets = st.lists(
    st.builds(
        ReplicaView,
        replica=st.just(0),
        requests=st.integers(0, 9),
        prompt_tokens=st.integers(0, 400),
        cached_tokens=st.integers(0, 100),
    ),
    min_size=1,
    max_size=7,
).map(lambda found: [ReplicaView(10 + at, "both", v.requests, v.prompt_tokens, cached_tokens=v.cached_tokens)
                     for at, v in enumerate(found)])  # fmt: skip


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@given(fleets, st.integers(0, 1 << 40))
@bounded(max_examples=40, derandomize=True, deadline=None)
def test_somebody_who_is_there_and_the_same_every_time(route: Route, fleet: list[ReplicaView], number: int) -> None:
    chosen = route(number, REQUEST, fleet)
    assert chosen in [view.replica for view in fleet]
    assert route(number, REQUEST, tuple(fleet)) == chosen


@given(fleets, st.integers(0, 1000))
@bounded(max_examples=60, derandomize=True, deadline=None)
def test_the_least_is_the_least(fleet: list[ReplicaView], number: int) -> None:
    by = {view.replica: view for view in fleet}
    assert by[least_tokens(number, REQUEST, fleet)].prompt_tokens == min(view.prompt_tokens for view in fleet)
    assert by[least_requests(number, REQUEST, fleet)].requests == min(view.requests for view in fleet)
    best = by[prefix(number, REQUEST, fleet)]
    assert all(best.prompt_tokens - best.cached_tokens <= view.prompt_tokens - view.cached_tokens for view in fleet)


@given(fleets, st.integers(0, 1000))
@bounded(max_examples=60, derandomize=True, deadline=None)
def test_the_heaviest_is_never_the_lighter_of_two(fleet: list[ReplicaView], number: int) -> None:
    most = max(view.prompt_tokens for view in fleet)
    if len(fleet) > 1 and [view.prompt_tokens for view in fleet].count(most) == 1:
        chosen = two_choices(number, REQUEST, fleet)
        assert next(view for view in fleet if view.replica == chosen).prompt_tokens < most


def test_round_robin_and_two_choices_spread_evenly() -> None:
    fleet = [ReplicaView(at) for at in range(5)]
    assert [round_robin(number, REQUEST, fleet) for number in range(6)] == [0, 1, 2, 3, 4, 0]
    counts = Counter(two_choices(number, REQUEST, fleet) for number in range(5000))
    assert all(900 < counts[at] < 1100 for at in range(5))
