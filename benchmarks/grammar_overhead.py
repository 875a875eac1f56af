"""What grammars cost: steps of 16 requests held to a JSON schema against steps of 16 that are free, same model, same
tokens per step, in interleaved rounds. Prints the time that masks add as a share of a step; the target is under 5 %.

    python benchmarks/grammar_overhead.py [rounds]
"""

from __future__ import annotations

import argparse
import json
import sys

from headrace.cli import parser
from headrace.cli.assemble import Phases, assemble
from headrace.core.clock import perf
from headrace.core.step import Admitted, StepPlan, Work
from headrace.core.types import Grammar, Request, Sampling, Tokens

BATCH, STEPS, PROMPT = 16, 24, 32
LIST = {"type": "array", "items": {"type": "string"}, "minItems": 100}
SCHEMA = {"type": "object", "properties": {"words": LIST}, "required": ["words"], "additionalProperties": False}


def seconds(executor: object, grammar: Grammar | None, first_step: int) -> float:
    """The fastest decode step: others on the machine only add."""
    blocks = -(-(PROMPT + STEPS + 1) // 16)
    requests = [
        Request(
            f"r{at}",
            (Tokens(tuple(range(100 + at, 100 + at + PROMPT))),),
            0.0,
            STEPS + 1,
            Sampling(temperature=0),
            grammar=grammar,
        )
        for at in range(BATCH)
    ]
    admitted = tuple(
        Admitted(one, (), tuple(range(at * blocks, (at + 1) * blocks)), 0) for at, one in enumerate(requests)
    )
    executor.step(StepPlan(first_step, tuple(Work(one.id, 0, PROMPT, True) for one in requests), admitted))  # type: ignore[attr-defined]
    taken = []
    for at in range(STEPS):
        works = tuple(Work(one.id, PROMPT + at, 1, True) for one in requests)
        begin_s = perf()
        executor.step(StepPlan(first_step + 1 + at, works))  # type: ignore[attr-defined]
        taken.append(perf() - begin_s)
    executor.step(StepPlan(first_step + STEPS + 1, (), released=tuple(one.id for one in requests)))  # type: ignore[attr-defined]
    return min(taken)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("rounds", nargs="?", type=int, default=5)
    rounds = options.parse_args().rounds
    args = parser().parse_args(["serve", "smollm2", "--kv-memory", "256MiB", "--max-context", "512"])
    assembled = assemble(args, {}, Phases())
    executor, grammar = assembled.loaded.executor, Grammar("json_schema", json.dumps(SCHEMA))
    assembled.grammars.check(grammar)
    pairs = []
    for at in range(rounds):
        free_s = seconds(executor, None, 1000 * at)
        held_s = seconds(executor, grammar, 1000 * at + 500)
        pairs.append((free_s, held_s))
        sys.stdout.write(f"free {1e3 * free_s:.1f} ms, held {1e3 * held_s:.1f} ms a step\n")
    free_s, held_s = (min(column) for column in zip(*pairs, strict=True))
    sys.stdout.write(f"masks add {held_s / free_s - 1:+.1%} to a step at batch {BATCH}\n")


if __name__ == "__main__":
    main()
