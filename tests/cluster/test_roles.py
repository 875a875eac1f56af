"""Who gets a request, and when its KV may move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.cluster.roles import NoReplica, accepts, decode_of, prefill_of
from headrace.cluster.view import ReplicaView

views = st.lists(
    st.builds(
        ReplicaView,
        replica=st.just(0),
        role=st.sampled_from(["both", "prefill", "decode"]),
        requests=st.integers(0, 9),
        prompt_tokens=st.integers(0, 9),
    ),
    max_size=6,
).map(lambda found: [ReplicaView(at, one.role, one.requests, one.prompt_tokens) for at, one in enumerate(found)])


@given(views)
@bounded(max_examples=60, derandomize=True, deadline=None)
def test_the_least_loaded_that_plays_the_role(fleet: list[ReplicaView]) -> None:
    for choose, other, load in ((prefill_of, "decode", "prompt_tokens"), (decode_of, "prefill", "requests")):
        able = [view for view in fleet if view.role != other]
        if not able:
            with pytest.raises(NoReplica):
                choose(fleet)
            continue
        chosen = fleet[choose(fleet)]
        assert chosen in able
        assert getattr(chosen, load) == min(getattr(view, load) for view in able)


def test_a_crowded_or_full_replica_pulls_nothing() -> None:
    assert accepts(ReplicaView(0, "decode", blocks=100, free_blocks=50), 50)
    assert not accepts(ReplicaView(0, "decode", blocks=100, free_blocks=50), 51)
    assert not accepts(ReplicaView(0, "decode", blocks=100, free_blocks=50, offered_blocks=5), 1)
