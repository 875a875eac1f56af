"""A request's tokens and log-probabilities do not depend on its batch, its chunks, the cache, or memory pressure.

The reference of every test is the same request computed alone, in one go, without a prefix cache. Log-probabilities are
compared as floats: one different last bit anywhere fails.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from rig import Generated, Model, Rig, request

from headrace.core.config import EngineSettings
from headrace.core.types import Request, Sampling

NO_CACHE = EngineSettings(prefix_cache=False)


def requests(count: int = 32, shared: int = 0, vocab: int = 500, longest: int = 200) -> list[Request]:
    """Greedy and sampled requests of mixed lengths, the first `shared` tokens in common."""
    rng = random.Random(count + shared)
    prefix = [rng.randrange(vocab) for _ in range(shared)]
    samplings = [
        Sampling(temperature=0, logprobs=2),
        Sampling(temperature=1.0, seed=5, logprobs=2),
        Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=6, logprobs=2),
        Sampling(temperature=0.9, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3, seed=7, logprobs=2),
    ]
    return [
        request(
            f"r{number}",
            prefix + [rng.randrange(vocab) for _ in range(rng.randrange(1, longest))],
            rng.randrange(1, 40),
            samplings[number % 4],
        )
        for number in range(count)
    ]


def alone(model: Model, batch: list[Request]) -> dict[str, Generated]:
    return {one.id: Rig(model, settings=NO_CACHE).run([one])[one.id] for one in batch}


@pytest.fixture(scope="module")
def plain(tiny: Model) -> dict[str, Generated]:
    return alone(tiny, requests())


@pytest.fixture(scope="module")
def sharing(tiny: Model) -> dict[str, Generated]:
    return alone(tiny, requests(shared=150))


@pytest.mark.parametrize("budget", [16, 64, 512])
def test_batch_of_32_in_chunks(tiny: Model, plain: dict[str, Generated], budget: int) -> None:
    assert Rig(tiny, budget=budget, settings=NO_CACHE).run(requests()) == plain


@pytest.mark.parametrize("budget", [16, 64, 512])
def test_prefix_hits(tiny: Model, sharing: dict[str, Generated], budget: int) -> None:
    rig = Rig(tiny, budget=budget)
    batch = requests(shared=150)
    assert rig.run(batch) == sharing  # hits within the batch
    assert rig.run(batch) == sharing  # hits on what an earlier batch left


@pytest.mark.parametrize("blocks", [40, 64])
def test_preemption(tiny: Model, sharing: dict[str, Generated], blocks: int) -> None:
    rig = Rig(tiny, blocks=blocks, budget=256)
    assert rig.run(requests(shared=150)) == sharing
    assert rig.preemptions > 0


def test_aborts_of_others(tiny: Model, sharing: dict[str, Generated]) -> None:
    rig = Rig(tiny, budget=128, blocks=64)
    gone = [f"r{number}" for number in range(0, 32, 3)]

    def abort_one(step: int) -> None:
        if step % 3 == 0 and gone:
            rig.scheduler.abort(gone.pop(), rig.now)

    doomed = set(gone)
    got = rig.run(requests(shared=150), abort_one)
    assert len(doomed - set(gone)) > 5
    for name in sharing.keys() - doomed:
        assert got[name] == sharing[name]


def test_prompt_logprobs_do_not_depend_on_chunks(tiny: Model) -> None:
    batch = [replace(r, sampling=replace(r.sampling, prompt_logprobs=3)) for r in requests(8, shared=40)]
    reference = alone(tiny, batch)
    for name, prompt in ((r.id, r.prompt_tokens) for r in batch):
        assert len(reference[name].prompt_logprobs) == prompt - 1
    assert Rig(tiny, budget=32).run(batch) == reference


def test_greedy_continuations_are_worth_comparing(plain: dict[str, Generated]) -> None:
    """Guards the tests above: a model that says one thing whatever it is asked would pass them all."""
    drawn = [token for generated in plain.values() for token in generated.token_ids]
    assert len(set(drawn)) > 100
