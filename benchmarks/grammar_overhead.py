"""What grammars cost: a step of 16 requests held to a JSON schema beside a step of 16 that are free, same model, same
lengths, in pairs that follow one another at once and take turns in who is first. The statistic is the median over all
pairs of held / free - 1; the target is under 5 %.

    python benchmarks/grammar_overhead.py [rounds]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from statistics import median, quantiles

from headrace.cli import parser
from headrace.cli.assemble import Phases, assemble
from headrace.core.clock import perf
from headrace.core.step import Admitted, StepPlan, Work
from headrace.core.types import Grammar, Request, Sampling, Tokens
from headrace.device.executor import ModelExecutor

BATCH, STEPS, PROMPT, BLOCK = 16, 24, 32, 16
LIST = {"type": "array", "items": {"type": "string"}, "minItems": 100}
SCHEMA = {"type": "object", "properties": {"words": LIST}, "required": ["words"], "additionalProperties": False}


@dataclass
class Group:
    """Requests that decode together, in blocks of their own."""

    executor: ModelExecutor
    name: str
    first_block: int
    grammar: Grammar | None
    computed_tokens: int = 0

    def begin(self, step: int) -> None:
        blocks = -(-(PROMPT + STEPS + 1) // BLOCK)
        admitted = []
        for at in range(BATCH):
            ids, first = tuple(range(100 + at, 100 + at + PROMPT)), self.first_block + at * blocks
            sampling = Sampling(temperature=0)
            request = Request(f"{self.name}{at}", (Tokens(ids),), 0.0, STEPS + 1, sampling, grammar=self.grammar)
            admitted.append(Admitted(request, (), tuple(range(first, first + blocks)), 0))
        self._run(step, PROMPT, tuple(admitted))

    def decode(self, step: int) -> float:
        """Seconds of one step."""
        begin_s = perf()
        self._run(step, 1)
        return perf() - begin_s

    def end(self, step: int) -> None:
        self.executor.step(StepPlan(step, (), released=tuple(f"{self.name}{at}" for at in range(BATCH))))

    def _run(self, step: int, tokens: int, admitted: tuple[Admitted, ...] = ()) -> None:
        works = tuple(Work(f"{self.name}{at}", self.computed_tokens, tokens, True) for at in range(BATCH))
        self.executor.step(StepPlan(step, works, admitted))
        self.computed_tokens += tokens


def round_of(executor: ModelExecutor, grammar: Grammar, number: int) -> list[float]:
    """The ratio of each pair of steps."""
    blocks = BATCH * -(-(PROMPT + STEPS + 1) // BLOCK)
    free, held = Group(executor, "free", 0, None), Group(executor, "held", blocks, grammar)
    step = 10 * STEPS * number
    free.begin(step)
    held.begin(step + 1)
    ratios = []
    for at in range(STEPS):
        order = (free, held) if at % 2 else (held, free)
        taken = {group.name: group.decode(step + 2 + 2 * at + turn) for turn, group in enumerate(order)}
        ratios.append(taken["held"] / taken["free"] - 1)
    free.end(step + 2 * STEPS + 2)
    held.end(step + 2 * STEPS + 3)
    return ratios


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("rounds", nargs="?", type=int, default=8)
    rounds = options.parse_args().rounds
    args = parser().parse_args(["run", "smollm2", "--kv-memory", "256MiB", "--max-context", "512"])
    assembled = assemble(args, {}, Phases())
    executor, grammar = assembled.executor, Grammar("json_schema", json.dumps(SCHEMA))
    assert isinstance(executor, ModelExecutor)
    assembled.grammars.check(grammar)
    ratios: list[float] = []
    for number in range(rounds):
        ratios += (last := round_of(executor, grammar, number))
        sys.stdout.write(f"round {number + 1}: median of {len(last)} pairs {median(last):+.1%}\n")
    low, _, high = quantiles(ratios, n=4)
    sys.stdout.write(
        f"masks add {median(ratios):+.1%} to a step at batch {BATCH}: the median of {len(ratios)} pairs, half of which "
        f"lie between {low:+.1%} and {high:+.1%}\n"
    )


if __name__ == "__main__":
    main()
