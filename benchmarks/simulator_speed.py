"""How many requests the simulator simulates per second of one core, below and at saturation, at once and step by step;
whether that stays so as the trace grows; and how long a fleet takes.

Lengths are ShareGPT's, policies the defaults, the price of a step linear, about that of an 8B model on one H100. Rates
are relative to the throughput of the saturated replica. Times are CPU seconds, because others use the machine; the
fleet's are wall seconds on two processes.

    python benchmarks/simulator_speed.py [requests, default 20000] [requests of the fleet, default 1000000, 0: none]
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from random import Random

from headrace.core.clock import perf
from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.sim.apart import simulate_apart
from headrace.sim.cost.linear import Linear
from headrace.sim.executor import MOST_STEPS
from headrace.sim.run import Report, Site, simulate
from headrace.workload.arrival import Arrival, Stretch
from headrace.workload.corpora import CORPORA
from headrace.workload.laws import corpus

H100_8B = Linear(step_s=6e-3, token_s=3e-5, reach_s=1e-9, context_s=2e-8)
SITE = Site(
    EngineSettings(max_queue_requests=1 << 30, max_queue_tokens=1 << 40),
    Capacity(blocks=30_000, block_tokens=16, max_context_tokens=8192, vocab=128_256, steps=MOST_STEPS),
    H100_8B,
    token_budget=2048,
)
STEPPING = replace(SITE, capacity=replace(SITE.capacity, steps=1))
SEED = 1
RUNS = 3  # the best counts
BOUND = 5000.0


def arrivals(count: int, rate: float) -> Iterator[Arrival]:
    """Poisson arrivals of `rate` per second; lengths from a sample of ten thousand, so that drawing costs little."""
    rng, draw = Random(SEED), corpus(CORPORA["sharegpt"])
    lengths = [draw(rng) for _ in range(10_000)]
    at_s = 0.0
    for _ in range(count):
        at_s += rng.expovariate(rate)
        prompt_tokens, output_tokens = rng.choice(lengths)
        yield Arrival(at_s, (Stretch(prompt_tokens),), output_tokens, max_new_tokens=4096)


def cpu_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def measure(name: str, count: int, rate: float, site: Site) -> tuple[float, Report]:
    best = 0.0
    for _ in range(RUNS if count <= 20_000 else 1):
        begun_s = cpu_s()
        report = simulate(arrivals(count, rate), site, seed=SEED)
        best = max(best, count / (cpu_s() - begun_s))
    totals = report.totals
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    running = max(value for _, value in totals.running.points())
    print(
        f"{name:<38}{count:>8}{best:>8.0f}{totals.plans / count:>8.2f}{totals.steps / totals.plans:>8.2f}"
        f"{running:>8.0f}{peak_mib:>8.0f}  seed {report.seed} {report.digest[:12]}"
    )
    return best, report


def main() -> None:
    count, fleet = ([int(word) for word in sys.argv[1:]] + [20_000, 1_000_000][len(sys.argv) - 1 :])[:2]
    print(f"{'one replica, one core':<38}{'':>8}{'/s':>8}{'plans':>8}{'steps':>8}{'most':>8}{'peak':>8}")
    print(f"{'':<38}{'requests':>8}{'':>8}{'/req.':>8}{'/plan':>8}{'running':>8}{'MiB':>8}")
    _, saturated = measure("saturated", count, 1e6, SITE)
    rate = saturated.totals.per_second()["requests"]
    measure("saturated, step by step", count, 1e6, STEPPING)
    speed, _ = measure(f"at 70 % ({0.7 * rate:.1f} requests/s)", count, 0.7 * rate, SITE)
    measure("at 70 %, step by step", count, 0.7 * rate, STEPPING)
    measure("at 30 %", count, 0.3 * rate, SITE)
    measure("at 30 %, step by step", count, 0.3 * rate, STEPPING)
    for times in (2, 4):
        measure("at 70 %, a longer trace", times * count, 0.7 * rate, SITE)
    print(f"bound {BOUND:.0f} requests/s at 70 %: {'kept' if speed >= BOUND else 'missed'}")
    if fleet:
        begun_s = perf()
        replicas = replace(SITE, replicas=100)
        simulate_apart(lambda: arrivals(fleet, 70 * rate), replicas, processes=2, seed=SEED)
        seconds, used = perf() - begun_s, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"100 replicas, {fleet} requests: {seconds:.0f} s wall, {used.ru_utime:.0f} CPU s of two processes, "
            f"{used.ru_maxrss / 1024:.0f} MiB at most in one"
        )


if __name__ == "__main__":
    main()
