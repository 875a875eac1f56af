"""Streams of arrivals: merging, slicing, scaling and splitting keep order, contents and sharing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.workload.arrival import Arrival, Stretch, block_keys
from headrace.workload.laws import parse_count, parse_law, parse_pairs
from headrace.workload.sessions import Recipe, conversations
from headrace.workload.streams import between, faster, longer, merge, part

TIMES = st.lists(st.floats(0, 100), max_size=30).map(sorted)


def alone(times: list[float], tenant: str = "") -> list[Arrival]:
    return [Arrival(at_s, (Stretch(10 + index),), 5, tenant=tenant) for index, at_s in enumerate(times)]


def chat(count: int = 30) -> list[Arrival]:
    recipe = Recipe(parse_pairs("40:90,5:50"), parse_count("1:5"), parse_law("exp:3"), prefix_tokens=35)
    return list(conversations(map(float, range(count)), recipe, "x"))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(TIMES, TIMES)
def test_merging_keeps_everything_in_order(one: list[float], other: list[float]) -> None:
    made = list(merge(alone(one, "a"), alone(other, "b")))
    assert [arrival.at_s for arrival in made] == sorted(one + other)
    assert [arrival for arrival in made if arrival.tenant == "a"] == alone(one, "a")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(TIMES, st.floats(0, 60), st.floats(0, 60))
def test_slices_cover_and_count_from_their_start(times: list[float], start: float, length: float) -> None:
    made = list(between(alone(times), start, start + length))
    assert [arrival.at_s for arrival in made] == [at - start for at in times if start <= at < start + length]


def test_slicing_stops_reading() -> None:
    stream = iter(alone([0.0, 1.0, 2.0, 3.0]))
    list(between(stream, 0.0, 1.5))
    assert len(list(stream)) == 1


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.floats(0.1, 10))
def test_faster_traffic_has_the_same_turns_at_their_earliest(speed: float) -> None:
    before = {(arrival.session, arrival.turn): arrival for arrival in faster(chat(), speed)}
    for (session, turn), arrival in before.items():
        if turn:
            earlier = before[session, turn - 1].at_s
            assert earlier is not None and arrival.gap_s is not None
            assert arrival.at_s == pytest.approx(earlier + arrival.gap_s)
    assert len(before) == len(chat())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.floats(0.05, 8), st.floats(0.05, 8))
def test_longer_prompts_share_as_they_did(prompt: float, output: float) -> None:
    plain, scaled = chat(), list(longer(chat(), prompt, output))
    for before, after in zip(plain, scaled, strict=True):
        assert after.output_tokens == max(1, round(before.output_tokens * output))
        asked = sum(stretch.tokens for stretch in before.prompt if not stretch.answer)
        got = sum(stretch.tokens for stretch in after.prompt if not stretch.answer)
        assert got == max(1, round(asked * prompt)) or before.turn
        assert abs(got - asked * prompt) <= 1
    turns = {(arrival.session, arrival.turn): arrival for arrival in scaled}
    for (session, turn), arrival in turns.items():
        if turn:
            keys = block_keys(turns[session, turn - 1].prompt, 4, b"")
            assert block_keys(arrival.prompt, 4, b"")[: len(keys)] == keys


def test_longer_keeps_a_limit_in_step() -> None:
    (scaled,) = longer([Arrival(0.0, (Stretch(10),), 8, 16)], output=0.5)
    assert (scaled.output_tokens, scaled.max_new_tokens, scaled.prompt_tokens) == (4, 8, 10)


def test_parts_are_disjoint_complete_and_keep_conversations_together() -> None:
    made = chat(400)
    train, held = list(part(made, 0.0, 0.8)), list(part(made, 0.8, 1.0))
    assert sorted(map(repr, train + held)) == sorted(map(repr, made))
    assert not {arrival.session for arrival in train} & {arrival.session for arrival in held}
    assert len({arrival.session for arrival in held}) == pytest.approx(80, abs=25)
    assert held != list(part(made, 0.8, 1.0, seed=1))
    requests = alone([float(at) for at in range(5000)])
    assert len(list(part(requests, 0.0, 0.3))) == pytest.approx(1500, abs=130)


def test_traffic_without_times_is_refused() -> None:
    for made in (merge([Arrival(None, (Stretch(1),), 1)], []), faster([Arrival(None, (Stretch(1),), 1)], 2.0)):
        with pytest.raises(ValueError, match="has no times"):
            list(made)
