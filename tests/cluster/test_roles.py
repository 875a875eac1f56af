"""Who gets a request, and when its KV may move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.cluster.roles import NoReplica, accepts, balance, decode_of, instances, prefill_of
from headrace.cluster.view import ReplicaView

views = st.lists(
    st.builds(
        ReplicaView,
        replica=st.just(0),
        role=st.sampled_from(["both", "prefill", "decode"]),
        requests=st.integers(0, 9),
        prompt_tokens=st.integers(0, 9),
        free_blocks=st.integers(0, 9),
    ),
    max_size=6,
).map(
    lambda found: [
        ReplicaView(at, one.role, one.requests, one.prompt_tokens, 9, one.free_blocks) for at, one in enumerate(found)
    ]
)


@given(views, st.integers(0, 9))
@bounded(max_examples=80, derandomize=True, deadline=None)
def test_a_prompt_goes_to_the_least_loaded_with_room(fleet: list[ReplicaView], blocks: int) -> None:
    able = [view for view in fleet if view.role != "decode"]
    if not able:
        with pytest.raises(NoReplica):
            prefill_of(fleet, blocks)
        return
    roomy, chosen = [view for view in able if view.free_blocks >= blocks], prefill_of(fleet, blocks)
    if chosen is None:
        assert not roomy
    else:
        assert fleet[chosen] in roomy
        assert fleet[chosen].prompt_tokens == min(view.prompt_tokens for view in roomy)


@given(views)
@bounded(max_examples=60, derandomize=True, deadline=None)
def test_an_answer_goes_to_the_least_loaded(fleet: list[ReplicaView]) -> None:
    able = [view for view in fleet if view.role != "prefill"]
    if not able:
        with pytest.raises(NoReplica):
            decode_of(fleet)
        return
    assert fleet[decode_of(fleet)] in able
    assert fleet[decode_of(fleet)].requests == min(view.requests for view in able)


def test_a_crowded_or_full_replica_pulls_nothing() -> None:
    assert accepts(ReplicaView(0, "decode", blocks=100, free_blocks=50), 50)
    assert not accepts(ReplicaView(0, "decode", blocks=100, free_blocks=50), 51)
    assert not accepts(ReplicaView(0, "decode", blocks=100, free_blocks=50, offered_blocks=5), 1)


@given(st.floats(0.01, 100), st.floats(0.1, 9), st.floats(0.1, 9))
@bounded(max_examples=80, derandomize=True, deadline=None)
def test_instances_are_enough_and_not_one_too_many(rate: float, prefill: float, decode: float) -> None:
    counts = instances(rate, prefill, decode)
    for count, each in zip(counts, (prefill, decode), strict=True):
        assert count * each >= rate * (1 - 1e-9)
        assert count == 1 or (count - 1) * each < rate * (1 + 1e-9)


def test_balance_is_the_best_worth_of_a_device() -> None:
    assert balance(2.0, 2.0, (1, 1)) == (1, 1)
    assert balance(1.0, 3.0, (1, 1)) == (3, 1)
    assert balance(4.0, 1.0, (2, 1)) == (1, 4)
