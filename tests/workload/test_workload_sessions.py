"""Conversations: keys that extend, gaps, order, sharing, and draws that the arrival rate does not touch."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice, pairwise
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.types import SLO
from headrace.workload.arrival import Arrival, block_keys
from headrace.workload.laws import parse_count, parse_law, parse_pairs, zipf
from headrace.workload.sessions import Recipe, closed_loop, conversations

CHAT = Recipe(parse_pairs("5:60,3:50"), turns=parse_count("1:6"), gap_s=parse_law("exp:2"))


def by_session(arrivals: list[Arrival]) -> dict[str, list[Arrival]]:
    found = defaultdict(list)
    for arrival in arrivals:
        found[arrival.session].append(arrival)
    return found


def starts(rate: float, count: int) -> list[float]:
    return [at / rate for at in range(count)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.1, 50), st.integers(1, 30), st.sampled_from([1, 4, 16]))
def test_every_turn_extends_the_one_before(seed: int, rate: float, count: int, size: int) -> None:
    made = list(conversations(starts(rate, count), CHAT, str(seed)))
    assert [arrival.at_s for arrival in made] == sorted(arrival.at_s or 0.0 for arrival in made)
    sessions = by_session(made)
    assert len(sessions) == count
    for turns in sessions.values():
        assert [arrival.turn for arrival in turns] == list(range(len(turns)))
        assert turns[0].gap_s is None
        for before, after in pairwise(turns):
            assert after.prompt[: len(before.prompt)] == before.prompt
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert after.prompt[len(before.prompt)].tokens == before.output_tokens
            assert after.prompt[len(before.prompt)].answer
            keys = block_keys(before.prompt, size, b"")
            assert block_keys(after.prompt, size, b"")[: len(keys)] == keys
            assert before.at_s is not None and after.at_s is not None and after.gap_s is not None
            assert after.at_s == pytest.approx(before.at_s + after.gap_s)


def test_conversations_have_their_turns_and_tool_gaps() -> None:
    """Continuum's case: four tools of five answer in 0.1 s, the fifth in 30 s."""
    recipe = replace(CHAT, turns=parse_count("2:10"), gap_s=parse_law("0.1@80+30@20"))
    made = list(conversations(starts(1.0, 3000), recipe, "1"))
    assert fmean(len(turns) for turns in by_session(made).values()) == pytest.approx(6, rel=0.02)
    gaps = Counter(arrival.gap_s for arrival in made if arrival.turn)
    assert set(gaps) == {0.1, 30.0}
    assert gaps[0.1] / gaps.total() == pytest.approx(0.8, abs=0.01)


def test_different_conversations_share_their_groups_prefix_and_nothing_else() -> None:
    recipe = replace(CHAT, prefix_tokens=32, groups=parse_count("0:3", 0), lengths=parse_pairs("64:90,9"))
    made = list(conversations(starts(1.0, 60), recipe, "2"))
    firsts = [turns[0] for turns in by_session(made).values()]
    assert {arrival.prompt[0].tokens for arrival in firsts} == {32}
    assert len({arrival.prompt[0].name for arrival in firsts}) == 4
    own = [stretch.name for turns in by_session(made).values() for stretch in turns[-1].prompt[1:]]
    assert len(set(own)) == len(own)
    keys = [block_keys(arrival.prompt, 16, b"") for arrival in firsts]
    heads, tails = {row[:2] for row in keys}, {key for row in keys for key in row[2:]}
    assert len(heads) == 4
    assert len(tails) == sum(len(row) - 2 for row in keys)


def test_a_prefix_never_makes_a_prompt_longer() -> None:
    made = list(conversations(starts(1.0, 20), Recipe(parse_pairs("10,5"), prefix_tokens=32), "3"))
    assert {arrival.prompt_tokens for arrival in made} == {10}
    assert {len(arrival.prompt) for arrival in made} == {1}


def test_popular_groups_and_tenants() -> None:
    ranks = zipf(1.1, 1, 20)
    recipe = Recipe(
        parse_pairs("64,5"), prefix_tokens=16, groups=lambda rng: int(ranks(rng)), tenants=parse_count("1:3")
    )
    made = list(conversations(starts(1.0, 5000), replace(recipe, tenant="t"), "4"))
    groups = Counter(arrival.prompt[0].name for arrival in made).most_common()
    assert groups[0][1] / 5000 == pytest.approx(1 / sum(k**-1.1 for k in range(1, 21)), rel=0.08)
    assert {arrival.tenant for arrival in made} == {"t1", "t2", "t3"}


def test_who_shares_nothing_has_no_names() -> None:
    made = list(conversations(starts(1.0, 5), Recipe(parse_pairs("64,5"), priority=2, slo=SLO(0.5)), "5"))
    assert {stretch.name for arrival in made for stretch in arrival.prompt} == {None}
    assert {(arrival.session, arrival.priority, arrival.slo) for arrival in made} == {("", 2, SLO(0.5))}


def test_conversations_stay_within_the_context_and_the_limit() -> None:
    recipe = replace(CHAT, turns=parse_count("50"), max_context_tokens=300, max_new_tokens=20)
    made = list(conversations(starts(1.0, 50), recipe, "6"))
    assert max(arrival.prompt_tokens + arrival.output_tokens for arrival in made) <= 300
    assert max(arrival.output_tokens for arrival in made) == 20
    assert {arrival.max_new_tokens for arrival in made} == {20}
    assert all(3 <= len(turns) < 50 for turns in by_session(made).values())


def test_another_rate_brings_the_same_conversations() -> None:
    """What is drawn does not depend on when, so that two loads can be compared request by request."""

    def contents(rate: float) -> list[tuple[object, ...]]:
        made = conversations(starts(rate, 40), CHAT, "7")
        return sorted((one.session, one.turn, one.prompt, one.output_tokens, one.gap_s or 0) for one in made)

    assert contents(0.2) == contents(20.0)


def test_streams_are_lazy_and_hold_only_what_is_under_way() -> None:
    endless = (float(at) for at in range(10**12))
    made = list(islice(conversations(endless, CHAT, "8"), 500))
    assert len(made) == 500


def test_closed_loop_requests_wait_for_a_client() -> None:
    made = list(islice(closed_loop(parse_law("exp:2"), Recipe(parse_pairs("9,5")), "9"), 4000))
    assert {arrival.at_s for arrival in made} == {None}
    assert fmean(arrival.gap_s or 0.0 for arrival in made) == pytest.approx(2, rel=0.08)
    assert made[:50] == list(islice(closed_loop(parse_law("exp:2"), Recipe(parse_pairs("9,5")), "9"), 50))


def test_seeds_make_different_traffic() -> None:
    one, other = (list(conversations(starts(1.0, 5), CHAT, seed)) for seed in ("a", "b"))
    assert one != other
    names = [{stretch.name for arrival in made for stretch in arrival.prompt} for made in (one, other)]
    assert not names[0] & names[1]
