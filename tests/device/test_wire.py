"""Whatever crosses between the two processes comes out as it went in, in whatever pieces it arrives; nonsense is
refused with one error."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import Bytes, DeviceSettings
from headrace.core.step import Admitted, Beat, Copy, Decode, Lane, Run, Sampled, StepPlan, StepResult, Work
from headrace.core.types import SLO, Blank, Grammar, Request, Sampling, Thinking, TokenLogprob, Tokens
from headrace.device import wire

SOME = settings(derandomize=True, deadline=None, max_examples=60)
NAMES = st.text(max_size=12)
COUNTS = st.integers(0, 2**40)
SMALL = st.integers(0, 300)
NUMBERS = st.floats(allow_nan=False)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple)


def tuples(of: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:  # type: ignore[type-arg]
    return st.lists(of, max_size=most).map(tuple)


SAMPLINGS = st.builds(
    Sampling, *[NUMBERS] * 2, SMALL, *[NUMBERS] * 4, tuples(st.tuples(SMALL, NUMBERS)), st.integers(0, 2**63 - 1),
    st.none() | SMALL, st.none() | SMALL,
)  # fmt: skip
REQUESTS = st.builds(
    Request,
    id=NAMES,
    prompt=tuples(st.builds(Tokens, IDS) | st.builds(Blank, SMALL)),
    arrival_s=NUMBERS,
    max_new_tokens=COUNTS,
    sampling=SAMPLINGS,
    stop_token_ids=st.frozensets(SMALL),
    block_keys=tuples(st.integers(0, 2**128 - 1)),
    salt=st.binary(max_size=20),
    priority=st.integers(-(2**31), 2**31),
    tenant=NAMES,
    model=NAMES,
    adapter=st.none() | NAMES,
    slo=st.none() | st.builds(SLO, st.none() | NUMBERS, st.none() | NUMBERS),
    deadline_s=st.none() | NUMBERS,
    grammar=st.none() | st.builds(Grammar, NAMES, NAMES),
    thinking=st.none() | st.builds(Thinking, NAMES, NAMES, st.booleans(), st.none() | SMALL, IDS, st.none() | SMALL),
)
WORKS = st.builds(
    Work, NAMES, SMALL, SMALL, st.booleans(), IDS, tuples(st.tuples(SMALL, SMALL)),
    st.none() | st.tuples(SMALL, SMALL), IDS,
)  # fmt: skip
BEATS = st.builds(
    Beat, COUNTS, tuples(st.builds(Decode, NAMES, COUNTS)), COUNTS, st.dictionaries(NAMES, IDS, max_size=3),
    tuples(NAMES), COUNTS,
)  # fmt: skip
PLANS = st.builds(
    StepPlan,
    step=COUNTS,
    others=tuples(WORKS),
    admitted=tuples(st.builds(Admitted, REQUESTS, IDS, IDS, SMALL)),
    released=tuples(NAMES),
    copies=tuples(st.builds(Copy, NAMES, NAMES, tuples(st.tuples(SMALL, SMALL)))),
    lanes=tuples(st.builds(Lane, NUMBERS, NAMES)),
    lane=SMALL,
    beat=st.none() | BEATS,
    steps=SMALL,
    until_s=st.just(math.inf) | NUMBERS,
)
LOGPROBS = tuples(st.builds(TokenLogprob, SMALL, NUMBERS, tuples(st.tuples(SMALL, NUMBERS))))
RESULTS = st.builds(
    StepResult,
    step=COUNTS,
    sampled=st.dictionaries(NAMES, st.builds(Sampled, IDS, LOGPROBS), max_size=3),
    prompt_logprobs=st.dictionaries(NAMES, LOGPROBS, max_size=2),
    others_drew=st.none() | SMALL,
    run=st.none() | st.builds(Run, SMALL, NUMBERS, NUMBERS),
    failed=st.dictionaries(NAMES, NAMES, max_size=2),
)


def through(reader: wire.Reader, data: bytes, cuts: list[int]) -> list:  # type: ignore[type-arg]
    """What a reader makes of bytes that arrive in these pieces."""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [message for begin, end in pairwise(edges) for message in reader.feed(data[begin:end])]


@SOME
@given(plans=st.lists(PLANS, max_size=3), cuts=st.lists(st.integers(0, 10**6), max_size=4))
def test_plans_survive_the_trip(plans: list[StepPlan], cuts: list[int]) -> None:
    data = b"".join(wire.frame(wire.Step(wire.plan_out(plan))) for plan in plans)
    came = [wire.plan_in(message.plan) for message in through(wire.from_parent(), data, cuts)]
    assert came == plans
    assert [type(admitted.request) for plan in came for admitted in plan.admitted] == [
        Request for plan in plans for _ in plan.admitted
    ]


@SOME
@given(results=st.lists(RESULTS, max_size=3), cuts=st.lists(st.integers(0, 10**6), max_size=4))
def test_results_survive_the_trip(results: list[StepResult], cuts: list[int]) -> None:
    data = b"".join(wire.frame(wire.Done(result)) for result in results)
    assert [message.result for message in through(wire.from_child(), data, cuts)] == results


def test_a_result_with_nothing_in_it_survives_too() -> None:
    (message,) = wire.from_child().feed(wire.frame(wire.Done(StepResult(1, {}))))
    assert message == wire.Done(StepResult(1, {}))


def test_every_field_of_a_plan_and_of_a_request_is_on_the_wire() -> None:
    assert wire._Plan._fields == StepPlan._fields
    assert wire._Admitted._fields == Admitted._fields
    assert set(wire._Wired.__struct_fields__) == {field.name for field in dataclasses.fields(Request)}
    here, there = get_type_hints(wire._Plan), get_type_hints(StepPlan)
    assert {name for name in here if here[name] != there[name]} == {"admitted"}


def test_what_is_to_be_loaded_survives() -> None:
    load = wire.Load("smollm2", DeviceSettings(kv_memory=Bytes(1 << 33), threads=2), 16, 256, 2048, embedding="mini")
    (message,) = wire.from_parent().feed(wire.frame(load))
    assert message == load


@SOME
@given(st.binary(max_size=60))
def test_nonsense_is_refused_with_one_error(body: bytes) -> None:
    for reader in (wire.from_parent(), wire.from_child()):
        try:
            list(reader.feed(wire.HEADER.pack(len(body)) + body))
        except wire.BadFrame as error:
            assert str(error)


def test_lengths_are_bounded_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(wire.BadFrame, match="larger"):
        list(wire.from_child().feed(b"\xff\xff\xff\xff"))
    monkeypatch.setattr(wire, "MAX_FRAME", 10)
    with pytest.raises(wire.BadFrame, match="larger"):
        wire.frame(wire.Phase("a long story"))
    with pytest.raises(wire.BadFrame, match="cannot be written"):
        wire.frame(wire.Failed(1 << 70, ""))
