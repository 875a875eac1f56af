"""A request's tokens and log-probabilities do not depend on its batch, its chunks, the cache, or memory pressure.

The reference of every test is the same request computed alone, in one go, without a prefix cache. Log-probabilities are
compared as floats: one different last bit anywhere fails.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from rig import Executors, Generated, Model, Rig, request

from headrace.core.config import EngineSettings
from headrace.core.step import Admitted, StepPlan, Work
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


def alone(model: Executors, batch: list[Request]) -> dict[str, Generated]:
    return {one.id: Rig(model, settings=NO_CACHE).run([one])[one.id] for one in batch}


@pytest.fixture(scope="module")
def plain(tiny: Executors) -> dict[str, Generated]:
    return alone(tiny, requests())


@pytest.fixture(scope="module")
def sharing(tiny: Executors) -> dict[str, Generated]:
    return alone(tiny, requests(shared=150))


@pytest.fixture(scope="module")
def experts(mixture: Model) -> dict[str, Generated]:
    return alone(mixture, requests(12, shared=40))


@pytest.mark.parametrize("budget", [16, 64, 512])
def test_batch_of_32_in_chunks(tiny: Executors, plain: dict[str, Generated], budget: int) -> None:
    assert Rig(tiny, budget=budget, settings=NO_CACHE).run(requests()) == plain


@pytest.mark.parametrize("budget", [16, 64, 512])
def test_prefix_hits(tiny: Executors, sharing: dict[str, Generated], budget: int) -> None:
    rig = Rig(tiny, budget=budget)
    batch = requests(shared=150)
    assert rig.run(batch) == sharing  # hits within the batch
    assert rig.run(batch) == sharing  # hits on what an earlier batch left


@pytest.mark.parametrize("blocks", [40, 64])
def test_preemption(tiny: Executors, sharing: dict[str, Generated], blocks: int) -> None:
    rig = Rig(tiny, blocks=blocks, budget=256)
    assert rig.run(requests(shared=150)) == sharing
    assert rig.preemptions > 0


def test_aborts_of_others(tiny: Executors, sharing: dict[str, Generated]) -> None:
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


LAYERED = EngineSettings(batch="layered")
LAYERED_ALONE = replace(LAYERED, prefix_cache=False)


@pytest.mark.parametrize("budget", [16, 64, 200])
def test_through_a_few_layers_at_a_time(tiny: Executors, plain: dict[str, Generated], budget: int) -> None:
    rig = Rig(tiny, budget=budget, settings=LAYERED_ALONE)
    assert rig.run(requests()) == plain
    assert rig.cut > 20


@pytest.mark.parametrize("blocks", [40, 4096])
def test_layers_beside_prefix_hits_and_preemption(tiny: Executors, sharing: dict[str, Generated], blocks: int) -> None:
    rig = Rig(tiny, blocks=blocks, budget=48, settings=LAYERED)
    assert rig.run(requests(shared=150)) == sharing
    assert rig.run(requests(shared=150)) == sharing
    assert rig.cut > 20
    assert (rig.preemptions > 0) == (blocks == 40)


def test_those_who_leave_between_layers_leave_no_trace(tiny: Executors, sharing: dict[str, Generated]) -> None:
    rig = Rig(tiny, budget=40, blocks=64, settings=LAYERED)
    gone = [f"r{number}" for number in range(0, 32, 3)]

    def abort_pending(step: int) -> None:
        for name, sequence in list(rig.executor._sequences.items()):
            if sequence.states is not None and name in gone:
                gone.remove(name)
                rig.scheduler.abort(name, rig.now)

    doomed = set(gone)
    got = rig.run(requests(shared=150), abort_pending)
    left = doomed - set(gone)
    assert len(left) > 2
    for name in sharing.keys() - left:
        assert got[name] == sharing[name]


@pytest.mark.parametrize("settings", [NO_CACHE, LAYERED_ALONE, LAYERED], ids=["chunked", "layered", "layered, cached"])
def test_a_mixture_of_experts(mixture: Model, experts: dict[str, Generated], settings: EngineSettings) -> None:
    rig = Rig(mixture, budget=40, settings=settings)
    assert rig.run(requests(12, shared=40)) == experts
    assert (rig.cut > 10) == (settings.batch == "layered")


def test_nobody_goes_on_where_it_has_not_come(tiny: Executors) -> None:
    executor, one = tiny.executor(8), request("a", range(20), 1, Sampling(temperature=0))
    admitted = Admitted(one, (), (0, 1), 0)
    with pytest.raises(RuntimeError, match="did not come there"):
        executor.step(StepPlan(0, (Work("a", 0, 20, False, layers=(1, 2)),), (admitted,)))
    executor.step(StepPlan(1, (Work("a", 0, 20, False, layers=(0, 2)),), (admitted,)))
    assert executor._sequences["a"].states is not None
    whole = executor.step(StepPlan(2, (Work("a", 0, 20, True),)))
    assert executor._sequences["a"].states is None
    assert whole.sampled["a"] == tiny.executor(8).step(StepPlan(0, (Work("a", 0, 20, True),), (admitted,))).sampled["a"]


def test_prompt_logprobs_do_not_depend_on_chunks(tiny: Executors) -> None:
    batch = [replace(r, sampling=replace(r.sampling, prompt_logprobs=3)) for r in requests(8, shared=40)]
    reference = alone(tiny, batch)
    for name, prompt in ((r.id, r.prompt_tokens) for r in batch):
        assert len(reference[name].prompt_logprobs) == prompt - 1
    assert Rig(tiny, budget=32).run(batch) == reference
    assert Rig(tiny, budget=32, settings=LAYERED).run(batch) == reference


def test_greedy_continuations_are_worth_comparing(plain: dict[str, Generated]) -> None:
    """Guards the tests above: a model that says one thing whatever it is asked would pass them all."""
    drawn = [token for generated in plain.values() for token in generated.token_ids]
    assert len(set(drawn)) > 100
