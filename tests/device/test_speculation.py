"""Drafts change how many steps an answer takes, and nothing else: tokens and log-probabilities are those without them,
greedy or sampled, to the bit. What is drawn follows the distribution it should follow."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from rig import Generated, Model, Rig, request
from test_metamorphic import alone, requests

from headrace.core.config import EngineSettings
from headrace.core.step import Admitted, StepPlan, Work
from headrace.core.types import Request, Sampling
from headrace.device.reference.draws import sample
from headrace.device.sampler import Row, joined

LOOKUP = EngineSettings(speculate="lookup", draft_control="always", draft_tokens=5)


def repetitive(count: int = 12, vocab: int = 500) -> list[Request]:
    """Prompts of a few tokens again and again, biased so that answers repeat themselves too."""
    rng = random.Random(count)
    batch = []
    for number in range(count):
        few = [rng.randrange(vocab) for _ in range(6)]
        prompt = [rng.choice(few) for _ in range(rng.randrange(8, 60))]
        bias = tuple((token, 7.0) for token in few)
        sampling = replace(requests(4)[number % 4].sampling, logit_bias=bias)
        batch.append(request(f"r{number}", prompt, rng.randrange(10, 60), sampling))
    return batch


@pytest.fixture(scope="module")
def plain(tiny: Model) -> dict[str, Generated]:
    return alone(tiny, repetitive())


@pytest.mark.parametrize("drafts", [1, 3, 16])
@pytest.mark.parametrize("budget", [24, 512])
def test_drafts_change_nothing(tiny: Model, plain: dict[str, Generated], drafts: int, budget: int) -> None:
    rig = Rig(tiny, budget=budget, settings=replace(LOOKUP, draft_tokens=drafts))
    assert rig.run(repetitive()) == plain
    assert rig.accepted > 20
    assert rig.drafted > rig.accepted


def test_drafts_beside_preemption(tiny: Model, plain: dict[str, Generated]) -> None:
    rig = Rig(tiny, blocks=24, budget=64, settings=LOOKUP)
    assert rig.run(repetitive()) == plain
    assert rig.preemptions
    assert rig.accepted


def test_goodput_changes_nothing_either(tiny: Model, plain: dict[str, Generated]) -> None:
    rig = Rig(tiny, budget=512, settings=replace(LOOKUP, draft_control="goodput"))
    assert rig.run(repetitive()) == plain  # steps of this rig take no longer with drafts, so they always pay
    assert rig.accepted > 20


def test_drafts_beside_prefix_hits_and_layers(tiny: Model, plain: dict[str, Generated]) -> None:
    rig = Rig(tiny, budget=40, settings=replace(LOOKUP, batch="layered"))
    assert rig.run(repetitive()) == plain
    assert rig.run(repetitive()) == plain  # with hits on blocks that drafts have filled
    assert rig.cut
    assert rig.accepted > 40


def test_drafts_after_a_prompt(tiny: Model) -> None:
    """The contract allows drafts with any known tokens; the token behind the last accepted one is drawn as ever."""
    one = request("a", range(20), 8, Sampling(temperature=0, logprobs=1))
    right = alone(tiny, [one])["a"]
    for wrong_at in range(5):
        drafts = [*right.token_ids[:5]]
        drafts[wrong_at] = (drafts[wrong_at] + 1) % 500
        executor = tiny.executor(8)
        plan = StepPlan(0, (Work("a", 0, 25, True, drafts=tuple(drafts)),), (Admitted(one, (), (0, 1), 0),))
        sampled = executor.step(plan).sampled["a"]
        assert sampled.token_ids == right.token_ids[: wrong_at + 1]
        assert sampled.logprobs == right.logprobs[: wrong_at + 1]
        after = executor.step(StepPlan(1, (Work("a", 20 + wrong_at, 1, True),))).sampled["a"]
        assert after.token_ids == right.token_ids[wrong_at + 1 : wrong_at + 2]


def test_the_block_table_ends_where_the_accepted_tokens_end(tiny: Model) -> None:
    one, executor = request("a", range(15), 60, Sampling(temperature=0)), tiny.executor(8)
    drafts = (499,) * 30
    assert alone(tiny, [one])["a"].token_ids[0] != 499
    executor.step(StepPlan(0, (Work("a", 0, 45, True, drafts=drafts),), (Admitted(one, (), (0, 1, 2), 0),)))
    assert executor._sequences["a"].blocks == [0]
    assert executor._sequences["a"].table.tolist() == [0]


# -- what is drawn follows its distribution ----------------------------------------------------------------------------

VOCAB, PAIRS = 5, 6000
TABLE = torch.tensor([[math.sin(3.0 * row + 1.7 * token) * 1.5 for token in range(VOCAB)] for row in range(VOCAB)])
CRITICAL = {24: 51.18, 11: 31.26, 8: 26.12}  # of chi-square, by degrees of freedom, at 0.001


def first_two(sampling: Sampling, drafts: tuple[int, ...]) -> Counter[tuple[int, ...]]:
    """The first two tokens of many walks, one per seed, along a Markov chain that starts at 0, with these drafts."""
    walks = [([0], Row(replace(sampling, seed=seed))) for seed in range(PAIRS)]
    while left := [(ids, row) for ids, row in walks if len(ids) < 3]:
        here = [drafts[len(ids) - 1 :] for ids, _ in left]
        rows = [after for (_, row), own in zip(left, here, strict=True) for after in row.with_drafts(own)]
        lasts = [last for (ids, _), own in zip(left, here, strict=True) for last in (ids[-1], *own)]
        drawn = iter(sample(TABLE[lasts].clone(), rows))
        for (ids, row), own in zip(left, here, strict=True):
            for token in joined(list(islice(drawn, len(own) + 1)), own).token_ids:
                ids.append(token)
                row.drew(token)
    return Counter(tuple(ids[1:3]) for ids, _ in walks)


def chance(sampling: Sampling, last: int, output: Counter[int]) -> torch.Tensor:
    """The distribution of the next token, written down independently of the sampler."""
    logits = TABLE[last].double().clone()
    for token, count in output.items():
        logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    chances = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_k:
        chances[chances < chances.topk(sampling.top_k).values[-1]] = 0
    return chances / chances.sum()


@pytest.mark.parametrize("drafts", [(), (1,), (4, 1), (0, 0, 0)])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=3),
        Sampling(temperature=1.3, presence_penalty=0.8, frequency_penalty=0.4),
    ],
    ids=["plain", "top-k", "penalties"],
)
def test_the_distribution_is_preserved(sampling: Sampling, drafts: tuple[int, ...]) -> None:
    found = first_two(sampling, drafts)
    expected = {}
    for one, first in enumerate(chance(sampling, 0, Counter()).tolist()):
        for two, second in enumerate(chance(sampling, one, Counter([one])).tolist()):
            expected[one, two] = first * second * PAIRS
    assert not [pair for pair in found if not expected[pair]], "a token that the filter drops was drawn"
    possible = [pair for pair in expected if expected[pair]]
    square = sum((found[pair] - expected[pair]) ** 2 / expected[pair] for pair in possible)
    assert square < CRITICAL[len(possible) - 1]
