"""Prompts as stretches, cut into the blocks of an engine: equal exactly where contents are equal, at any block size,
and continued by the engine where an answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import EngineSettings
from headrace.core.events import Event
from headrace.core.keys import first_key, next_key
from headrace.core.ports import Capacity
from headrace.core.step import Sampled, StepResult
from headrace.core.types import Output
from headrace.engine.scheduler import Scheduler
from headrace.workload.arrival import (
    ANSWER_TOKEN,
    STOP_TOKEN,
    Arrival,
    Stretch,
    Traffic,
    block_keys,
    name_of,
    token_ids,
    traffic,
)

STRETCHES = st.builds(Stretch, st.integers(1, 40), st.integers(0, 3), st.booleans())
PROMPTS = st.lists(STRETCHES, min_size=1, max_size=5)
SIZES = st.sampled_from([1, 3, 4, 16])


def contents(prompt: Sequence[Stretch]) -> list[int]:
    return token_ids(prompt, 0, sum(stretch.tokens for stretch in prompt))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(PROMPTS, SIZES)
def test_every_full_block_of_a_named_prompt_has_a_key_of_its_own(prompt: list[Stretch], size: int) -> None:
    keys = block_keys(prompt, size, b"")
    assert len(keys) == sum(stretch.tokens for stretch in prompt) // size
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**128 for key in keys)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(PROMPTS, PROMPTS, PROMPTS, SIZES)
def test_prompts_share_the_blocks_that_their_common_stretches_fill(
    common: list[Stretch], one: list[Stretch], other: list[Stretch], size: int
) -> None:
    ones = block_keys([*common, Stretch(40, 7), *one], size, b"")
    others = block_keys([*common, Stretch(40, 8), *other], size, b"")
    shared = sum(stretch.tokens for stretch in common) // size
    assert ones[:shared] == others[:shared]
    assert not set(ones[shared:]) & set(others[shared:])


@settings(derandomize=True, max_examples=200, deadline=None)
@given(PROMPTS, st.integers(1, 40), st.integers(0, 40), SIZES)
def test_a_stretch_cut_short_shares_its_full_blocks(common: list[Stretch], cut: int, more: int, size: int) -> None:
    """Mooncake's last block of a prompt is the beginning of a longer one's."""
    short = block_keys([*common, Stretch(cut, 9)], size, b"")
    long = block_keys([*common, Stretch(cut + more, 9)], size, b"")
    assert long[: len(short)] == short


def test_salts_separate_and_nameless_stretches_end_the_keys() -> None:
    prompt = [Stretch(64, 1), Stretch(64)]
    assert len(block_keys(prompt, 16, b"")) == 4
    assert not set(block_keys(prompt, 16, b"a")) & set(block_keys(prompt, 16, b"b"))
    assert block_keys([Stretch(64)], 16, b"") == ()
    assert block_keys([Stretch(63, 1), Stretch(64)], 16, b"") == block_keys([Stretch(63, 1)], 16, b"")


def test_names_far_apart_have_contents_far_apart() -> None:
    """Neighbouring names, as Mooncake counts them, must not have overlapping ids."""
    starts = sorted(contents([Stretch(1, name)])[0] for name in range(2000))
    assert min(after - before for before, after in pairwise(starts)) > 10_000_000


def test_answers_contain_what_the_executor_draws() -> None:
    assert contents([Stretch(3, 5, answer=True)]) == [ANSWER_TOKEN, ANSWER_TOKEN, STOP_TOKEN]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), SIZES)
def test_the_engine_continues_the_chain_of_the_next_turn(asked: int, answered: int, then: int, size: int) -> None:
    """A request's keys, continued over its drawn tokens as `engine.memory` does it, are keys of the next prompt."""
    first = (Stretch(asked, name_of("user 0")),)
    second = (*first, Stretch(answered, name_of("answer 0"), answer=True), Stretch(then, name_of("user 1")))
    request = made(Arrival(0.0, first, answered), size).request
    tail = [token for segment in request.prompt for token in getattr(segment, "ids", ())]
    known = tail + [ANSWER_TOKEN] * (answered - 1) + [STOP_TOKEN]
    keys = list(request.block_keys)
    key = keys[-1] if keys else first_key(request.salt)
    for start in range(0, len(known) - size + 1, size):
        key = next_key(key, known[start : start + size])
        keys.append(key)
    assert keys == list(block_keys(second, size, b""))[: len(keys)]
    assert len(keys) == (asked + answered) // size


def made(arrival: Arrival, block_tokens: int = 4) -> Traffic:
    return traffic(arrival, f"r{arrival.turn}", now_s=0.0, block_tokens=block_tokens, max_new_tokens=64)


def test_a_request_tells_no_policy_how_long_its_answer_is() -> None:
    short, long = (made(Arrival(0.0, (Stretch(10, 1),), tokens, tenant="t")) for tokens in (3, 60))
    assert short.request == long.request
    assert (short.output_tokens, long.output_tokens) == (3, 60)
    assert short.request.max_new_tokens == 64
    assert short.request.stop_token_ids == {STOP_TOKEN}
    assert short.request.salt == b"t"
    assert made(Arrival(0.0, (Stretch(10, 1),), 3, 20)).request.max_new_tokens == 20


class Silent:
    def observe(self, event: Event) -> None:
        pass


def serve(scheduler: Scheduler, job: Traffic) -> Output:
    """Run one request to its end, drawing what a simulated executor draws."""
    scheduler.add(job.request, 0.0)
    drawn = 0
    while plan := scheduler.plan(0.0):
        sampled = {}
        for work in plan.work:
            if work.sample:
                drawn += 1
                sampled[work.request_id] = Sampled((STOP_TOKEN if drawn == job.output_tokens else ANSWER_TOKEN,))
        for output in scheduler.commit(StepResult(plan.step, sampled), 0.0):
            if output.finish:
                return output
    raise AssertionError("the request never finished")


def cached(requests: Sequence[Traffic]) -> list[int]:
    """Prompt tokens that the engine's own prefix cache held for each of them, served one after the other."""
    capacity = Capacity(blocks=400, block_tokens=4, max_context_tokens=1000, vocab=2)
    scheduler = Scheduler(EngineSettings(block_tokens=4), capacity, token_budget=64, observer=Silent())
    outputs = [serve(scheduler, job) for job in requests]
    scheduler.check()
    assert [output.usage.output_tokens for output in outputs if output.usage] == [job.output_tokens for job in requests]
    return [output.usage.cached_tokens for output in outputs if output.usage]


def test_the_next_turn_finds_the_answer_in_the_engines_cache() -> None:
    first = (Stretch(30, name_of("user 0")),)
    second = (*first, Stretch(21, name_of("answer 0"), answer=True), Stretch(9, name_of("user 1")))
    turns = [made(Arrival(0.0, first, 21)), made(Arrival(0.0, second, 5, turn=1))]
    computed = 30 + 21 - 1  # the last token drawn is never computed
    assert cached(turns) == [0, computed // 4 * 4]
    keyless = replace(turns[1].request, block_keys=())
    assert cached([turns[0], Traffic(keyless, 5)]) == [0, 0]


def test_short_prompts_of_different_conversations_do_not_meet() -> None:
    """Their answers are equal token by token; only the tail of the prompt tells them apart."""
    ones, others = (
        ((Stretch(3, name),), (Stretch(3, name), Stretch(40, name + 1, answer=True), Stretch(5, name + 2)))
        for name in (100, 200)
    )
    assert cached([made(Arrival(0.0, ones[0], 40)), made(Arrival(0.0, others[1], 4, turn=1))]) == [0, 0]
    assert cached([made(Arrival(0.0, ones[0], 40)), made(Arrival(0.0, ones[1], 4, turn=1))]) == [0, 40]
