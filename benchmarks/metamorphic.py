"""The metamorphic matrix on SmolLM2: how many tokens and log-probabilities differ from each request computed alone?

fp32, 32 requests of mixed lengths, greedy and sampled, half of their prompts shared. Every row of the table is one way
of serving them; the reference computes each alone, in one go, without a prefix cache.

    python benchmarks/metamorphic.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "device"))

from rig import Generated, Model, Rig
from test_metamorphic import NO_CACHE, alone, requests

from headrace.core import config
from headrace.device import sources
from headrace.device.checkpoint import open_checkpoint


def differing(got: dict[str, Generated], reference: dict[str, Generated]) -> tuple[int, int]:
    """(tokens, log-probabilities) that differ, among the requests that finished."""
    tokens = logprobs = 0
    for name, one in got.items():
        expected = reference[name]
        tokens += abs(len(one.token_ids) - len(expected.token_ids))
        tokens += sum(a != b for a, b in zip(one.token_ids, expected.token_ids, strict=False))
        logprobs += sum(a != b for a, b in zip(one.logprobs, expected.logprobs, strict=False))
    return tokens, logprobs


def main() -> None:
    checkpoint = open_checkpoint(sources.resolve("smollm2", config.home()))
    model = Model(checkpoint.config, checkpoint.tensor)
    batch = requests(32, shared=64, vocab=49152, longest=120)
    reference = alone(model, batch)
    total = sum(len(one.token_ids) for one in reference.values())
    print(f"{len(batch)} requests, {total} tokens in the reference")
    kept = Rig(model, budget=512)
    kept.run(batch)
    pressed = [Rig(model, budget=budget, blocks=48) for budget in (64, 512)]
    aborting = Rig(model, budget=128)
    doomed = [f"r{number}" for number in range(0, 32, 3)]

    def abort_one(step: int) -> None:
        if step % 2 == 0 and doomed:
            aborting.scheduler.abort(doomed.pop(), aborting.now)

    def survivors() -> dict[str, Generated]:
        got = aborting.run(batch, abort_one)
        gone = {f"r{number}" for number in range(0, 32, 3)}
        return {name: one for name, one in got.items() if name not in gone}

    settings: list[tuple[str, Callable[[], dict[str, Generated]]]] = [
        *[
            (
                f"batch of 32, steps of {budget} tokens",
                lambda b=budget: Rig(model, budget=b, settings=NO_CACHE).run(batch),
            )
            for budget in (16, 64, 512)
        ],
        *[
            (f"prefix hits within the batch, steps of {budget}", lambda b=budget: Rig(model, budget=b).run(batch))
            for budget in (16, 64, 512)
        ],
        ("prefix hits on an earlier batch", lambda: kept.run(batch)),
        *[(f"preemption, steps of {rig.budget}", lambda rig=rig: rig.run(batch)) for rig in pressed],
        ("others aborted", survivors),
    ]
    for name, run in settings:
        tokens, logprobs = differing(run(), reference)
        print(f"  {name:48} {tokens} tokens, {logprobs} log-probabilities differ", flush=True)
    print(f"preemptions under pressure: {', '.join(str(rig.preemptions) for rig in pressed)}")


if __name__ == "__main__":
    main()
