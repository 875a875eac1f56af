"""The pool against a model of itself, and the order in which cached blocks go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.pool import Pool
from headrace.engine.prefix import PrefixIndex


def named_pool(blocks: int) -> tuple[Pool, PrefixIndex]:
    index = PrefixIndex()
    return Pool(blocks, index), index


def test_free_blocks_go_before_cached_ones_and_those_least_recently_released_first() -> None:
    pool, index = named_pool(4)
    first, second, third = (pool.allocate() for _ in range(3))
    for key, block in enumerate((first, second, third)):
        index.insert(key, block)
    pool.release([third, first, second])
    untouched = pool.allocate()
    assert untouched not in (first, second, third)
    assert [pool.allocate() for _ in range(3)] == [third, first, second]
    assert len(index) == 0


def test_sharing_brings_a_cached_block_back_and_renews_its_turn() -> None:
    pool, index = named_pool(2)
    old, new = pool.allocate(), pool.allocate()
    index.insert(1, old)
    index.insert(2, new)
    pool.release([old, new])
    pool.share(old)
    assert pool.held(old)
    assert pool.free == 1
    pool.release([old])
    assert pool.allocate() == new
    assert index.find(1) == old


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool, _ = named_pool(1)
    block = pool.allocate()
    pool.share(block)
    pool.release([block])
    assert pool.free == 0
    pool.release([block])
    assert pool.free == 1


def test_a_forgotten_block_is_an_ordinary_free_one() -> None:
    pool, index = named_pool(1)
    block = pool.allocate()
    index.insert(7, block)
    pool.release([block])
    pool.forget(block)
    pool.check()
    assert index.find(7) is None
    assert pool.allocate() == block


def test_an_empty_pool_says_so() -> None:
    pool, _ = named_pool(1)
    pool.allocate()
    with pytest.raises(IndexError):
        pool.allocate()


@pytest.mark.parametrize("damage", ["lost", "twice", "unnamed"])
def test_check_sees_damage(damage: str) -> None:
    pool, index = named_pool(3)
    block = pool.allocate()
    index.insert(1, block)
    pool.release([block])
    if damage == "lost":
        pool._free.pop()
    elif damage == "twice":
        pool._free.append(pool._free[0])
    else:
        index.forget(block)
    with pytest.raises(AssertionError):
        pool.check()


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_any_sequence_of_calls(data: st.DataObject) -> None:
    """References are what the holders hold; a named block stays findable until everything else is taken."""
    pool, index = named_pool(data.draw(st.integers(1, 6)))
    held: list[int] = []
    keys = iter(range(1000))
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["allocate", "share", "name", "release", "forget"]))
        if action == "allocate" and pool.free:
            cached_before = len(pool._cached)
            unnamed = len(pool._free)
            held.append(pool.allocate())
            assert len(pool._cached) == cached_before - (not unnamed)
        elif action == "share" and len(index):
            block = data.draw(st.sampled_from(sorted(index._key)))
            pool.share(block)
            held.append(block)
        elif action == "name" and held:
            block = data.draw(st.sampled_from(sorted(held)))
            if not index.holds(block):
                assert index.insert(next(keys), block)
        elif action == "release" and held:
            pool.release([held.pop(data.draw(st.integers(0, len(held) - 1)))])
        elif action == "forget":
            pool.forget(data.draw(st.integers(0, pool.blocks - 1)))
        pool.check()
        pool.check_held([held])
        index.check()
        assert pool.used == len(set(held))
    pool.release(held)
    assert pool.free == pool.blocks
