"""Batches of texts: nobody starves, nothing exceeds the budget, failures reach who is concerned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.ports import Encoding
from headrace.core.types import Overloaded, Unavailable
from headrace.engine.embedding import Batcher, EncodingFailed, form

LENGTHS = st.lists(st.integers(1, 300), max_size=50)


class Recorder:
    """An encoder whose vectors are the ids as bytes, and which fails on id 13."""

    encoding = Encoding("recorder", 1, 300, 256, "bert")

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    async def encode(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        self.batches.append([len(one) for one in sequences])
        await asyncio.sleep(0)
        if any(13 in one for one in sequences):
            raise RuntimeError("broken")
        return [bytes(one) for one in sequences]


@settings(derandomize=True)
@given(LENGTHS, st.integers(1, 500))
def test_a_batch_has_the_oldest_and_fits(lengths: list[int], budget: int) -> None:
    taken = form(lengths, budget)
    assert (taken[:1] == [0]) == bool(lengths) and len(set(taken)) == len(taken)
    if taken:
        assert max(lengths[at] for at in taken) == lengths[0]
        assert len(taken) == 1 or len(taken) * lengths[0] <= budget


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1), min_size=1, max_size=8))
def test_everybody_gets_their_own_vectors(calls: list[list[list[int]]]) -> None:
    async def main() -> None:
        batcher = Batcher(Recorder(), 10_000, 16)
        running = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*(batcher.embed(call) for call in calls))
        assert answers == [[bytes(one) for one in call] for call in calls]
        assert batcher.waiting_tokens == 0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        with pytest.raises(Unavailable):
            await batcher.embed([[1]])

    asyncio.run(main())


def test_concurrent_requests_share_batches_and_a_failure_stays_in_its_own() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher = Batcher(recorder, 20, 4)
        good, bad, more = (asyncio.create_task(batcher.embed(one)) for one in ([[1, 1]], [[13] * 4], [[2, 2]]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.embed([[1] * 15])
        running = asyncio.create_task(batcher.run())
        assert (await good, await more) == ([b"\x01\x01"], [b"\x02\x02"])
        with pytest.raises(EncodingFailed):
            await bad
        assert recorder.batches == [[2, 2], [4]]
        running.cancel()

    asyncio.run(main())
