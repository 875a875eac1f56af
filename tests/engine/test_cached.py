"""Whose cached block goes next: against a plain list for one owner, and the floor of each where there are more."""

from __future__ import annotations

from itertools import count

from engine_rig import Rig, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core import events
from headrace.engine.cached import KEPT, TURNS, Cached


def fill(cached: Cached, size: int, blocks: range, owner: str) -> list[int]:
    """Add these one by one to a cache of that size; returns what had to go."""
    gone = []
    for block in blocks:
        if len(cached) == size:
            gone.append(cached.take())
        cached.add([block], owner)
        cached.check()
    return gone


def test_one_owner_loses_what_was_released_longest_ago() -> None:
    cached = Cached(4)
    assert fill(cached, 4, range(9), "a") == [0, 1, 2, 3, 4]
    cached.remove(5)
    cached.add([5], "a")
    assert [cached.take() for _ in range(4)] == [6, 7, 8, 5]
    assert len(cached) == 0


def test_a_flood_evicts_its_own() -> None:
    """An eighth of eighty blocks is divided by two."""
    cached = Cached(80)
    cached.add(range(5), "a")
    gone = fill(cached, 80, range(100, 100 + 79 * TURNS), "b")
    assert set(range(5)).isdisjoint(gone) and gone == sorted(gone)
    assert cached.kept("b") == cached.kept("a") == 5 and cached.kept() == 10


def test_more_than_the_floor_is_lost_to_others() -> None:
    cached = Cached(80)
    fill(cached, 80, range(30), "a")
    fill(cached, 80, range(100, 200), "b")
    assert sorted(block for block in cached if block < 100) == [25, 26, 27, 28, 29]


def test_who_stays_away_keeps_nothing() -> None:
    cached = Cached(80)
    cached.add([0, 1, 2], "a")
    fill(cached, 80, range(100, 100 + 80 * TURNS + 80), "b")
    assert not {0, 1, 2} & set(cached) and cached.kept("b") == 0


def test_where_all_have_little_the_oldest_goes() -> None:
    cached = Cached(80)
    for block, owner in enumerate("abab"):
        cached.add([block], owner)
    assert [cached.take() for _ in range(4)] == [0, 1, 2, 3]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_whoever_keeps_coming_keeps_a_share(data: st.DataObject) -> None:
    """Any interleaving of owners: nobody who came lately is brought below its floor while others have more."""
    size, numbers = data.draw(st.integers(1, 60)), count()
    cached, owners = Cached(size), dict[int, str]()
    for _ in range(data.draw(st.integers(0, 150))):
        owner = data.draw(st.sampled_from("abc"))
        if len(cached) == size:
            held = {one: sum(owners[block] == one for block in cached) for one in "abc"}
            floor, spare = size // (KEPT * len(cached._lately)), cached.kept() < size
            gone = owners[cached.take()]
            assert not spare or gone not in cached._lately or held[gone] > floor
        cached.add([block := next(numbers)], owner)
        owners[block] = owner
        cached.check()


def hit_rate(flood: int) -> float:
    """Of one prompt of tenant `a`, asked again and again, how much is found in the cache, beside so many prompts of
    another tenant each time, as many at once as there is memory for, none of which is ever asked again."""
    rig, numbers = Rig(128, 64, prefix_cache=True), count()
    for turn in range(40):
        rig.add(make_request(f"a{turn}", [1] * 25, 2, tenant="a"))
        for _ in range(flood):
            rig.add(make_request(f"b{(at := next(numbers))}", [100 + at] * 25, 2, tenant="b"))
        rig.drain()
    admitted = [one for one in rig.recorder.of(events.Admitted) if one.request_id.startswith("a")]
    return sum(one.cached_tokens for one in admitted) / (25 * len(admitted))


def test_a_flood_takes_less_than_ten_points_of_another_tenant_s_hits() -> None:
    alone = hit_rate(0)
    assert alone > 0.8 and hit_rate(20) > alone - 0.1
