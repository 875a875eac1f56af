"""What scheduling policies promise, for real on this machine: a long prompt among running streams, two tenants of whom
one floods, and urgent requests under saturation. The live engine in this process, its streams read by clients.

Run `python benchmarks/scheduling_live.py [--only intrusion]`, alone on the machine; some six minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from statistics import mean, median

from headrace.cli.assemble import Phases, add_model, step_price, token_budget
from headrace.cli.calibrate import Live, open_live
from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.metrics import Metrics
from headrace.core.types import Request, Tokens
from headrace.engine.loop import Engine
from headrace.engine.policy import choose
from headrace.engine.scheduler import Scheduler

TARGET_MS = 300.0
SHORT_MS = 100.0  # where the step in progress is what everybody who comes waits for
FLAGS = [
    "--inter-token-ms",
    f"{TARGET_MS:g}",
    "--kv-memory",
    "2GiB",
    "--max-context",
    "4096",
    "--max-queue-requests",
    "4096",
]
INTRUDER = 2048  # tokens of the long prompt
RUNNING = 8  # side by side, where places are to be scarce
FLOOD = 20  # times what the other tenant sends


@dataclass(slots=True)
class Seen:
    """One request as its client saw it."""

    tenant: str
    sent_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    def gaps_s(self, since_s: float = 0.0) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.token_s) if after > since_s]


class Crowd:
    """Clients of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[Seen] = []
        self._engine = engine
        self._numbers = itertools.count()

    async def ask(self, prompt: int, output: int, *, tenant: str = "", priority: int = 0) -> Seen:
        number = next(self._numbers)
        rng = Random(number)
        ids = tuple(rng.randrange(3, self._engine.capacity.vocab) for _ in range(prompt))
        one = Seen(tenant, clock.now())
        self.seen.append(one)
        request = Request(str(number), (Tokens(ids),), one.sent_s, output, tenant=tenant, priority=priority)
        async for answer in self._engine.generate(request):
            one.token_s += [clock.now()] * len(answer.token_ids)
        return one

    async def stream(
        self, rate: float, seconds: float, prompt: int, output: int, tenant: str, priority: int = 0
    ) -> None:
        """Requests at Poisson times; returns when the last has been sent."""
        rng, end_s = Random(tenant + str(rate)), clock.now() + seconds
        asked = []
        while clock.now() < end_s:
            asked.append(asyncio.create_task(self.ask(prompt, output, tenant=tenant, priority=priority)))
            await clock.sleep(rng.expovariate(rate))
        if priority or tenant == "victim":
            await asyncio.gather(*asked)


async def play(live: Live, settings: EngineSettings, clients: Callable[[Crowd], Awaitable[None]]) -> Crowd:
    """Some clients against a fresh scheduler in front of the loaded model, with a token budget that follows its steps
    as under `serve`, unless the settings fix it. What still waits in the end is dropped."""
    executor = live.loaded.executor
    policies, budget = choose(settings, step_s=step_price(live.loaded.steps)), token_budget(settings, live.loaded.steps)
    scheduler = Scheduler(settings, executor.capacity, token_budget=budget, observer=Metrics(), policies=policies)
    engine = Engine("live", scheduler, executor)
    crowd, serving = Crowd(engine), asyncio.create_task(engine.run())
    await clients(crowd)
    await engine.drain(0.0)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
    return crowd


def p99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 when all are alike, 1/n when one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


# -- a long prompt among running streams -------------------------------------------------------------------------------


def intrusion(live: Live) -> None:
    print(f"\nfour streams decode, then a prompt of {INTRUDER} tokens comes; target {TARGET_MS:g} ms")
    worst = {}
    ways = (
        ("chunked", "chunked", None),
        ("as at load", "chunked", live.token_budget),
        ("prefill-first", "prefill-first", 1 << 20),
    )
    for name, batch, budget in ways:
        crowd = clock.run(_intrude(live, replace(live.settings, batch=batch, token_budget=budget)))
        *streams, intruder = crowd.seen
        gaps = [gap for one in streams for gap in one.gaps_s(intruder.sent_s)]
        worst[name] = max(gaps)
        print(
            f"  {name:14} worst gap {1e3 * max(gaps):7.0f} ms, median {1e3 * median(gaps):5.0f} ms; "
            f"the intruder's first token after {intruder.ttft_s:5.1f} s"
        )
    bound = worst["chunked"] <= 2 * TARGET_MS / 1e3
    ratio = worst["prefill-first"] / worst["chunked"]
    print(
        f"  chunked is {'within' if bound else 'NOT within'} twice the target; prefill-first is {ratio:.1f} times worse"
    )


async def _intrude(live: Live, settings: EngineSettings) -> Crowd:
    async def clients(crowd: Crowd) -> None:
        streams = [asyncio.create_task(crowd.ask(32, 150)) for _ in range(4)]
        while not all(len(one.token_s) > 10 for one in crowd.seen) or len(crowd.seen) < 4:
            await clock.sleep(0.05)
        await crowd.ask(INTRUDER, 4)
        await asyncio.gather(*streams)

    return await play(live, settings, clients)


# -- two tenants -------------------------------------------------------------------------------------------------------

PROMPT, OUTPUT = 256, 24


def fairness(live: Live) -> None:
    """As many side by side as there is room for: steps are what is scarce, and places are not."""
    settings = replace(live.settings, inter_token_ms=SHORT_MS)
    rate = clock.run(_capacity(live, settings))
    print(
        f"\ntwo tenants, prompts of {PROMPT} and answers of {OUTPUT}, target {SHORT_MS:g} ms: "
        f"{rate:.2f} requests/s at most"
    )
    solo = clock.run(_tenants(live, settings, 0.25 * rate, 0.0, 60.0))
    alone = [one.ttft_s for one in solo.seen if one.token_s]
    print(
        f"  victim alone at {0.25 * rate:.2f}/s: TTFT p99 {p99(alone):.2f} s, mean {mean(alone):.2f} s ({len(alone)})"
    )
    for ordering in ("fcfs", "vtc", "drr"):
        fair = replace(settings, ordering=ordering)
        crowd = clock.run(_tenants(live, fair, 0.25 * rate, FLOOD, 60.0))
        mine = [one.ttft_s for one in crowd.seen if one.tenant == "victim" and one.token_s]
        both = clock.run(_tenants(live, fair, 0.75 * rate, FLOOD, 40.0, wait=False))
        begin_s, end_s = both.seen[0].sent_s + 10, both.seen[0].sent_s + 40
        served = {
            tenant: sum(begin_s < at_s <= end_s for one in both.seen if one.tenant == tenant for at_s in one.token_s)
            for tenant in ("victim", "flood")
        }
        print(
            f"  {ordering:5} beside {FLOOD} times as many: victim's TTFT p99 {p99(mine):6.2f} s "
            f"({p99(mine) / p99(alone):.2f} x alone); both backlogged: Jain {jain(list(served.values())):.3f} {served}"
        )


async def _capacity(live: Live, settings: EngineSettings) -> float:
    """Requests per second of a crowd that came at once."""

    async def clients(crowd: Crowd) -> None:
        await asyncio.gather(*(crowd.ask(PROMPT, OUTPUT) for _ in range(4 * RUNNING)))

    crowd = await play(live, settings, clients)
    span_s = max(one.token_s[-1] for one in crowd.seen) - crowd.seen[0].sent_s
    return len(crowd.seen) / span_s


async def _tenants(
    live: Live, settings: EngineSettings, rate: float, flood: float, seconds: float, wait: bool = True
) -> Crowd:
    async def clients(crowd: Crowd) -> None:
        victim = crowd.stream(rate, seconds, PROMPT, OUTPUT, "victim")
        if not flood:
            await victim
            return
        flooding = asyncio.create_task(crowd.stream(flood * rate, seconds, PROMPT, OUTPUT, "flood"))
        if wait:
            await victim
        else:
            ending = asyncio.create_task(victim)
            await clock.sleep(seconds)
            ending.cancel()
        flooding.cancel()

    return await play(live, settings, clients)


# -- urgent requests ---------------------------------------------------------------------------------------------------


def priority(live: Live) -> None:
    """One step is the longest that may be in progress when somebody comes: the target says how long that is."""
    settings = replace(live.settings, max_running=RUNNING, inter_token_ms=SHORT_MS)
    urgent = replace(settings, ordering="priority", preemption="priority")
    print(f"\nurgent requests (prompts of 240 tokens) while {RUNNING} others run and more wait, target {SHORT_MS:g} ms")
    idle = [one.ttft_s for one in clock.run(_urgent(live, settings, 0)).seen]
    bound = 1.5 * p99(idle) + SHORT_MS / 1e3
    print(
        f"  idle: TTFT p99 {p99(idle):.3f} s, median {median(idle):.3f} s; bound 1.5 x idle + one step = {bound:.3f} s"
    )
    for name, chosen in (("fcfs", settings), ("priority, preempting", urgent)):
        crowd = clock.run(_urgent(live, chosen, 4 * RUNNING))
        mine = [one.ttft_s for one in crowd.seen if one.tenant == "urgent" and one.token_s]
        gaps = [gap for one in crowd.seen if one.tenant == "many" for gap in one.gaps_s()]
        print(
            f"  {name:22} TTFT p99 {p99(mine):6.3f} s, median {median(mine):6.3f} s: "
            f"{'kept' if p99(mine) <= bound else 'missed'}; "
            f"steps of the others: median {median(gaps):.3f} s, p99 {p99(gaps):.3f} s"
        )


async def _urgent(live: Live, settings: EngineSettings, others: int) -> Crowd:
    """Twenty urgent requests, one after the other."""

    async def clients(crowd: Crowd) -> None:
        async def busy() -> None:
            while True:
                await crowd.ask(64, 64, tenant="many")

        many = [asyncio.create_task(busy()) for _ in range(others)]
        await clock.sleep(5.0 if others else 0.0)
        for number in range(20):
            await crowd.ask(240, 2, tenant="urgent", priority=100)
            await clock.sleep(0.1 + 0.05 * (number % 7))
        for one in many:
            one.cancel()
        await asyncio.gather(*many, return_exceptions=True)

    return await play(live, settings, clients)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("intrusion", "fairness", "priority"))
    add_model(parser)
    args = parser.parse_args([*FLAGS, *sys.argv[1:]])
    live = open_live(args, Phases())
    print(f"steps of {live.token_budget} tokens at first; measured {live.loaded.steps}")
    for experiment in (intrusion, fairness, priority):
        if args.only in (None, experiment.__name__):
            experiment(live)
    clock.run(live.loaded.executor.close())
    return 0


if __name__ == "__main__":
    sys.exit(main())
