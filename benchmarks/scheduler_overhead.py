"""What one step of planning and committing costs, without an executor: results are made before the clock starts.

256 requests with contexts of about 1,000 tokens decode; with churn, requests finish, others arrive and are prefilled
in chunks beside the decodes. Prints microseconds per step, the best of several runs, because others use the machine.
The bound is on plan + commit; counting the events in `core.metrics` comes on top and is shown beside it.

    python benchmarks/scheduler_overhead.py
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median, quantiles

from headrace.core.clock import perf
from headrace.core.config import EngineSettings
from headrace.core.events import Event
from headrace.core.keys import block_keys
from headrace.core.metrics import Metrics
from headrace.core.ports import Capacity, Observer
from headrace.core.step import Sampled, StepPlan, StepResult
from headrace.core.types import Request, Tokens
from headrace.engine.scheduler import Scheduler

RUNNING, STEPS, RUNS, BLOCK_TOKENS = 256, 400, 5, 16
CAPACITY = Capacity(blocks=40_000, block_tokens=BLOCK_TOKENS, max_context_tokens=8192, vocab=50_000)
BOUND_US = 300.0


class Silent:
    """Observes nothing."""

    def observe(self, event: Event) -> None:
        return


def request(number: int, prompt_tokens: int, max_new_tokens: int) -> Request:
    ids = tuple(random.Random(number).choices(range(CAPACITY.vocab), k=prompt_tokens))
    keys = block_keys(ids, BLOCK_TOKENS, b"")
    return Request(str(number), (Tokens(ids),), 0.0, max_new_tokens, stop_token_ids=frozenset({1}), block_keys=keys)


def answer(plan: StepPlan, rng: random.Random) -> StepResult:
    ids = [work.request_id for work in plan.work if work.sample]
    return StepResult(plan.step, {name: Sampled((rng.randrange(2, CAPACITY.vocab),)) for name in ids})


def run(churn: bool, observer: Observer) -> list[float]:
    """Microseconds of plan + commit for each measured step."""
    rng = random.Random(0)
    settings = EngineSettings(max_running=RUNNING)
    scheduler = Scheduler(settings, CAPACITY, token_budget=RUNNING + 512, observer=observer)
    lengths = (200, 1000) if churn else (2 * STEPS, 2 * STEPS)
    spare = [request(number, 700, rng.randint(*lengths)) for number in range(2 * RUNNING + 2 * STEPS)]
    costs = []
    measuring = False
    for step in range(3 * STEPS):
        while scheduler.live < RUNNING + (8 if churn else 0) and spare:
            scheduler.add(spare.pop(), float(step))
        started = perf()
        plan = scheduler.plan(float(step))
        planned = perf()
        assert plan is not None
        result = answer(plan, rng)
        answered = perf()
        scheduler.commit(result, float(step))
        cost_us = (perf() - answered + planned - started) * 1e6
        measuring = measuring or len(plan.work) >= RUNNING - (24 if churn else 0)
        if measuring:
            costs.append(cost_us)
        if len(costs) == STEPS:
            break
    return costs


def report(name: str, churn: bool, observer: Callable[[], Observer]) -> float:
    runs = [run(churn, observer()) for _ in range(RUNS)]
    best = min(runs, key=median)
    print(f"{name:<44}{median(best):>8.0f}{quantiles(best, n=100)[98]:>8.0f}")
    return median(best)


def main() -> None:
    print(f"plan + commit, {RUNNING} running requests, best of {RUNS} runs of {STEPS} steps, microseconds per step")
    print(f"{'':<44}{'median':>8}{'p99':>8}")
    worst = max(report("decoding", False, Silent), report("arrivals, completions, chunks", True, Silent))
    report("decoding, with metrics", False, Metrics)
    report("arrivals, completions, chunks, with metrics", True, Metrics)
    print(f"bound {BOUND_US:.0f}: {'kept' if worst < BOUND_US else 'exceeded'}")


if __name__ == "__main__":
    main()
