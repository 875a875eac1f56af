"""The simulator against the live engine on this machine: six workloads that the calibration has not seen, the same
arrivals run for real and in virtual time, one table of live, simulated and error.

Run `make accuracy`, alone on the machine. The speed of shared machines wanders by 10 % and more within seconds, and
that is no error of the simulator. So every workload is played in many short turns, between which a few steps are
measured (a pulse) as `headrace calibrate` measures them; they see nothing of the workloads. One fit knows how steps
compare, from the calibrations at the beginning and the end and all pulses; the pulses on both sides of a turn tell how
fast the machine was. Metrics are those of all turns of a workload together. Live times are those of a client in the
same process that reads the engine's streams; HTTP comes on top.

    calibration | chat | pulse | chat | pulse | clients | ... | pulse | bursts | calibration      one of `--turns`
                '--- level ---'
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean

import msgspec

from headrace.cli.assemble import Phases, add_model
from headrace.cli.calibrate import Extent, Live, fitted, open_live, report
from headrace.cli.calibrate import measure as measure_steps
from headrace.cli.recordings import Both
from headrace.core import clock
from headrace.core.events import Event, Finished
from headrace.core.keys import block_keys
from headrace.core.types import Request, Tokens
from headrace.engine.loop import Engine
from headrace.engine.scheduler import Scheduler
from headrace.sim.calibration import Calibration, Point
from headrace.sim.measure import Step, Watch, grouped
from headrace.sim.run import Site, simulate
from headrace.workload.arrival import Arrival
from headrace.workload.settings import WorkloadSettings, workload

FLAGS = ["--max-running", "32", "--token-budget", "128", "--kv-memory", "3GiB"]
EXTENT = Extent(rows=32, context=512, rounds=3)
PULSE = Extent(rows=16, context=64, rounds=1)
_PULSES = 10_000  # added to the labels of their sessions
CHAT, LONG = "16:120,8:48", "16:100@85+260:440@15,8:48"
MEAN_BOUND, P99_BOUND = 0.05, 0.15


@dataclass(frozen=True, slots=True)
class Workload:
    """Traffic, at a share of what the engine can take if there is one: then its rate is that."""

    name: str
    settings: WorkloadSettings
    share: float | None = None

    def at(self, rate: float) -> WorkloadSettings:
        process, _, *shape = (self.settings.arrivals or "").split(":")
        return replace(self.settings, arrivals=":".join((process, f"{rate:.4f}", *shape)))

    def reseeded(self, turn: int) -> Workload:
        return replace(self, settings=replace(self.settings, seed=self.settings.seed + 100 * turn))


WORKLOADS = (
    Workload("chat, Poisson at 50 %", WorkloadSettings("poisson:1", CHAT, seed=1), 0.5),
    Workload("chat, Poisson at 180 %", WorkloadSettings("poisson:1", CHAT, seed=2), 1.8),
    Workload("16 clients who think 0.5 s", WorkloadSettings("closed:16:exp:0.5", CHAT, seed=3)),
    Workload(
        "conversations, shared prefix, 60 %",
        WorkloadSettings(
            "poisson:1", "16:80,8:40", turns="2:4", gap="exp:2", shared_prefix=96, groups="4", max_context=500, seed=4
        ),
        0.6,
    ),
    Workload("long prompts among short, 60 %", WorkloadSettings("poisson:1", LONG, seed=5), 0.6),
    Workload("bursts (Gamma, CV 2), 60 %", WorkloadSettings("gamma:1:0.25", CHAT, seed=6), 0.6),
)


@dataclass(frozen=True, slots=True)
class Life:
    """One request as its client saw it."""

    sent_s: float
    first_s: float
    last_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """What is compared. Seconds, and output tokens per second."""

    ttft_mean: float
    ttft_p99: float
    tpot_mean: float
    e2e_mean: float
    throughput: float

    @classmethod
    def of(cls, turns: Sequence[Sequence[Life]]) -> Metrics:
        lives = [life for turn in turns for life in turn]
        ttfts = sorted(life.first_s - life.sent_s for life in lives)
        tpots = [(life.last_s - life.first_s) / (life.tokens - 1) for life in lives if life.tokens > 1]
        return cls(
            mean(ttfts),
            ttfts[math.ceil(0.99 * len(ttfts)) - 1],
            mean(tpots),
            mean(life.last_s - life.sent_s for life in lives),
            sum(life.tokens for life in lives) / sum(map(span, turns)),
        )


def span(lives: Sequence[Life]) -> float:
    """Seconds from the first request to the last token."""
    return max(life.last_s for life in lives) - min(life.sent_s for life in lives)


@dataclass(frozen=True, slots=True)
class Turn:
    """Some seconds of one workload, live."""

    workload: Workload
    arrivals: list[Arrival]
    clients: int
    lives: list[Life]
    steps: list[Step]
    cached_tokens: int
    pulse: int  # the one before it; the next comes after it
    others: float  # of all processor time, meanwhile


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: all turns of a workload."""

    name: str
    requests: int
    rate: float  # requests per second that came
    live: Metrics
    simulated: Metrics
    cached: tuple[int, int]  # tokens found in the prefix cache, live and simulated
    steps: float  # simulated seconds of the live steps over their own, minus 1
    outside: float  # share of the live steps that the calibration did not cover
    levels: tuple[float, ...]  # how dear steps were in each turn, by the pulses: 1 is the mean
    others: float  # of all processor time, meanwhile


@dataclass(frozen=True, slots=True)
class Used:
    """Processor seconds of the whole machine since it started, as Linux counts them."""

    total_s: float
    busy_s: float  # stolen by the hypervisor, too
    own_s: float  # of this process

    @classmethod
    def now(cls) -> Used:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        own, rate = os.times(), os.sysconf("SC_CLK_TCK")
        return cls(sum(ticks) / rate, (sum(ticks) - ticks[3] - ticks[4]) / rate, own.user + own.system)

    def others_since(self, before: Used) -> float:
        """The share of the machine that went to others. A busy neighbour slows every barrier of a step."""
        busy_s, own_s = self.busy_s - before.busy_s, self.own_s - before.own_s
        return max(0.0, busy_s - own_s) / max(self.total_s - before.total_s, 1e-9)


class Lives:
    """An `Observer` that keeps what becomes of requests."""

    def __init__(self) -> None:
        self.all: list[Life] = []
        self.cached_tokens = 0

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished) and event.first_token_s is not None:
            self.all.append(Life(event.arrival_s, event.first_token_s, event.at_s, event.usage.output_tokens))
            self.cached_tokens += event.usage.cached_tokens


# -- live --------------------------------------------------------------------------------------------------------------


class Clients:
    """Send arrivals to an engine and read its streams. A later turn holds what the model answered before, so the
    prefix cache finds it as it would for a real client."""

    def __init__(self, engine: Engine, vocab: int) -> None:
        self.lives: list[Life] = []
        self._engine = engine
        self._vocab = vocab
        self._answers: dict[str, list[tuple[int, ...]]] = {}  # by session, one per turn
        self._numbers = itertools.count()

    async def play(self, arrivals: Iterable[Arrival], clients: int) -> None:
        rows = list(arrivals)
        if rows[0].at_s is None:
            waiting = deque(rows)
            await asyncio.gather(*(self._client(waiting) for _ in range(clients)))
            return
        begin_s = clock.now() + 0.05
        sessions: dict[str, list[Arrival]] = {}
        for at, row in enumerate(rows):
            sessions.setdefault(row.session or f"alone {at}", []).append(row)
        await asyncio.gather(*(self._session(turns, begin_s) for turns in sessions.values()))

    async def _client(self, waiting: deque[Arrival]) -> None:
        while waiting:
            arrival = waiting.popleft()
            await clock.sleep(arrival.gap_s or 0.0)
            await self._send(arrival)

    async def _session(self, turns: Sequence[Arrival], begin_s: float) -> None:
        await clock.sleep_until(begin_s + (turns[0].at_s or 0.0))
        for at, arrival in enumerate(turns):
            if at:
                await clock.sleep(arrival.gap_s or 0.0)
            await self._send(arrival)

    async def _send(self, arrival: Arrival) -> None:
        request = self._request(arrival)
        ids: list[int] = []
        first_s = 0.0
        async for output in self._engine.generate(request):
            if output.error:
                raise RuntimeError(output.error)
            first_s = first_s or clock.now()
            ids += output.token_ids
        self.lives.append(Life(request.arrival_s, first_s, clock.now(), len(ids)))
        if arrival.session:
            self._answers.setdefault(arrival.session, []).append(tuple(ids))

    def _request(self, arrival: Arrival) -> Request:
        """The arrival with real tokens: those of a stretch follow from its name, those of an answer were drawn."""
        number = next(self._numbers)
        answers = iter(self._answers.get(arrival.session, ()))
        ids: list[int] = []
        shared = 0  # tokens before the first stretch without a name
        for stretch in arrival.prompt:
            if stretch.answer:
                ids += next(answers)
            else:
                source = Random(f"{number}" if stretch.name is None else stretch.name)
                ids += [source.randrange(3, self._vocab) for _ in range(stretch.tokens)]
            shared = len(ids) if stretch.name is not None else shared
        keys = block_keys(ids[:shared], self._engine.capacity.block_tokens, b"")
        return Request(str(number), (Tokens(tuple(ids)),), clock.now(), arrival.output_tokens, block_keys=keys)


async def play(live: Live, arrivals: Sequence[Arrival], clients: int) -> tuple[list[Life], list[Step], int]:
    """Arrivals through a fresh engine in front of the loaded model; what its clients saw, its steps, the tokens that
    it found in its prefix cache."""
    executor, lives = live.loaded.executor, Lives()
    watch = Watch(executor)
    observer = Both(watch, lives)
    scheduler = Scheduler(live.settings, executor.capacity, token_budget=live.token_budget, observer=observer)
    engine = Engine("accuracy", scheduler, watch)
    serving = asyncio.create_task(engine.run())
    people = Clients(engine, executor.capacity.vocab)
    await people.play(arrivals, clients)
    await clock.sleep(0.1)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return people.lives, watch.steps, lives.cached_tokens


def steps_now(live: Live, extent: Extent) -> list[Step]:
    quiet: Callable[[str, float], None] = lambda what, share: None  # noqa: E731
    return clock.run(measure_steps(live, extent, quiet))


# -- simulated ---------------------------------------------------------------------------------------------------------


def imagine(site: Site, arrivals: Iterable[Arrival], clients: int) -> tuple[list[Life], int]:
    lives = Lives()
    simulate(arrivals, site, clients=clients, observer=lives)
    return lives.all, lives.cached_tokens


def saturation(site: Site, settings: WorkloadSettings) -> float:
    """Requests, or conversations, per second of a crowd that came at once."""
    rows = list(workload(replace(settings, arrivals="poisson:1000", requests=300, gap="0")))
    lives, _ = imagine(site, rows, 1)
    span_s = max(life.last_s for life in lives) - min(life.sent_s for life in lives)
    return len({row.session or str(at) for at, row in enumerate(rows)}) / span_s


def traffic(site: Site, asked: Workload, seconds: float) -> tuple[list[Arrival], int]:
    """Arrivals of about so many seconds, and the clients of a closed loop."""
    clients = asked.settings.clients or 1
    if asked.share is None:
        probe = list(workload(replace(asked.settings, requests=300)))
        lives, _ = imagine(site, probe, clients)
        requests = round(300 * seconds / max(life.last_s for life in lives))
        return list(workload(replace(asked.settings, requests=requests))), clients
    rate, seconds = asked.share * saturation(site, asked.settings), seconds / max(1.0, asked.share)
    return list(workload(replace(asked.at(rate), seconds=seconds))), clients


# -- both --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prices:
    """What steps cost: one fit for how they compare, and how dear all of them were at each pulse."""

    points: tuple[Point, ...]
    fitted: Calibration
    levels: tuple[float, ...]

    @classmethod
    def of(cls, live: Live, calibrations: Sequence[list[Step]], pulses: Sequence[list[Step]]) -> Prices:
        steps = [step for some in calibrations for step in some]
        steps += [step._replace(label=_PULSES + (step.label or 0)) for some in pulses for step in some]
        fit = fitted(live, steps)
        cost = fit.cost()
        ratios = [
            mean(one.sample.seconds / cost.estimate(one.sample.batch).seconds for one in grouped(some))
            for some in pulses
        ]
        return cls(fit.points, fit, tuple(ratio / mean(ratios) for ratio in ratios))

    def level(self, turn: Turn) -> float:
        return mean(self.levels[turn.pulse : turn.pulse + 2])

    def site(self, live: Live, level: float = 1.0) -> Site:
        """The engine on a machine whose every step takes `level` times as long."""
        capacity, budget = live.loaded.executor.capacity, live.token_budget
        points = tuple(msgspec.structs.replace(point, seconds=point.seconds * level) for point in self.points)
        numbers = tuple(number * level for number in self.fitted.fitted.coefficients)
        fit = msgspec.structs.replace(self.fitted.fitted, coefficients=numbers)
        site = msgspec.structs.replace(self.fitted, points=points, fitted=fit).site()
        return replace(site, settings=live.settings, capacity=capacity, token_budget=budget)


def compare(live: Live, prices: Prices, turns: Sequence[Turn]) -> Row:
    """All turns of one workload in virtual time."""
    simulated, spent_s, priced_s, outside, steps, cached = [], 0.0, 0.0, 0, 0, 0
    for turn in turns:
        site = prices.site(live, prices.level(turn))
        lives, found = imagine(site, turn.arrivals, turn.clients)
        simulated.append(lives)
        costs = [site.cost.estimate(step.batch) for step in turn.steps]
        priced_s += sum(cost.seconds for cost in costs)
        spent_s += sum(step.seconds for step in turn.steps)
        outside += sum(cost.extrapolated for cost in costs)
        steps, cached = steps + len(costs), cached + found
    came = [max(life.sent_s for life in turn.lives) - min(life.sent_s for life in turn.lives) for turn in turns]
    return Row(
        turns[0].workload.name,
        sum(len(turn.lives) for turn in turns),
        sum(len(turn.arrivals) for turn in turns) / sum(came),
        Metrics.of([turn.lives for turn in turns]),
        Metrics.of(simulated),
        (sum(turn.cached_tokens for turn in turns), cached),
        priced_s / spent_s - 1,
        outside / steps,
        tuple(prices.level(turn) for turn in turns),
        mean(turn.others for turn in turns),
    )


def error(simulated: float, live: float) -> float:
    return simulated / live - 1


COLUMNS = (
    ("TTFT mean ms", "ttft_mean", 1000),
    ("TTFT p99 ms", "ttft_p99", 1000),
    ("TPOT mean ms", "tpot_mean", 1000),
    ("E2E mean ms", "e2e_mean", 1000),
    ("output tok/s", "throughput", 1),
)


def table(rows: Sequence[Row]) -> str:
    """Live, simulated and error of every metric of every workload, the means of the errors, and the verdict."""
    head = " | ".join(f"{name:^22}" for name, _, _ in COLUMNS)
    under = " | ".join(f"{'live':>7}{'sim':>7}{'error':>8}" for _ in COLUMNS)
    lines = [f"{'workload':34} | {head}", f"{'':34} | {under}"]
    errors: dict[str, list[float]] = {field: [] for _, field, _ in COLUMNS}
    for row in rows:
        cells = []
        for _, field, scale in COLUMNS:
            live, simulated = getattr(row.live, field), getattr(row.simulated, field)
            errors[field].append(abs(error(simulated, live)))
            cells.append(f"{scale * live:7.0f}{scale * simulated:7.0f}{error(simulated, live):+8.1%}")
        lines.append(f"{row.name:34} | {' | '.join(cells)}")
    means = " | ".join(f"{mean(errors[field]):>22.1%}" for _, field, _ in COLUMNS)
    lines.append(f"{'mean of the errors':34} | {means}")
    means_all = [one for _, field, _ in COLUMNS if field != "ttft_p99" for one in errors[field]]
    verdict = mean(means_all) <= MEAN_BOUND and mean(errors["ttft_p99"]) <= P99_BOUND
    lines.append(
        f"mean error of the means {mean(means_all):.1%} (bound {MEAN_BOUND:.0%}, worst {max(means_all):.1%}), "
        f"of p99 {mean(errors['ttft_p99']):.1%} (bound {P99_BOUND:.0%}, worst {max(errors['ttft_p99']):.1%}): "
        f"{'within' if verdict else 'NOT within'} the bounds"
    )
    return "\n".join(lines)


def notes(row: Row) -> str:
    levels = ", ".join(f"{level:.2f}" for level in row.levels)
    return (
        f"  {row.name}: {row.requests} requests, {row.rate:.2f} a second; prefix cache {row.cached[0]} tokens live, "
        f"{row.cached[1]} simulated; live steps priced {row.steps:+.1%}, {row.outside:.1%} of them outside the "
        f"measured range; the machine's level in each turn {levels}; others used {row.others:.1%} of the machine"
    )


def measure(live: Live, args: argparse.Namespace) -> list[Row]:
    steps_now(live, PULSE)  # the first steps touch memory for the first time
    calibrations, pulses, turns = [steps_now(live, EXTENT)], [steps_now(live, PULSE)], []
    first = Prices.of(live, calibrations, pulses).site(live)
    asked = [one for one in WORKLOADS if args.only in one.name]
    order = Random(0)
    for number in range(args.turns):
        for one in order.sample(asked, len(asked)):
            print(f"turn {number + 1} of {args.turns}: {one.name}", file=sys.stderr, flush=True)
            arrivals, clients = traffic(first, one.reseeded(number), args.seconds / args.turns)
            used = Used.now()
            lives, steps, cached = clock.run(play(live, arrivals, clients))
            others = Used.now().others_since(used)
            turns.append(Turn(one, arrivals, clients, lives, steps, cached, len(pulses) - 1, others))
            pulses.append(steps_now(live, PULSE))
    calibrations.append(steps_now(live, EXTENT))
    clock.run(live.loaded.executor.close())
    if args.steps:
        keep = (calibrations, pulses, [(turn.workload.name, turn.pulse, turn.steps) for turn in turns])
        args.steps.write_bytes(msgspec.json.encode(keep))
    prices = Prices.of(live, calibrations, pulses)
    print(report(prices.fitted), flush=True)
    return [compare(live, prices, [turn for turn in turns if turn.workload is one]) for one in asked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--steps", type=Path, metavar="FILE", help="keep every live step, for finding out why")
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads whose name has this in it")
    parser.add_argument("--seconds", type=float, default=80.0, help="of arrivals of each workload (default: 80)")
    parser.add_argument("--turns", type=int, default=8, help="that each workload is played in (default: 8)")
    args = parser.parse_args([*FLAGS, *sys.argv[1:]])
    live = open_live(args, Phases())
    rows = measure(live, args)
    print("\n".join(map(notes, rows)))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
