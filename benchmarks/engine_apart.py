"""A process or a thread for the half that computes: what each costs and what each does to the pages about the server.

Two servers of the same model, one of each kind, take turns; whoever has no turn does nothing. A turn is 16 streams that
decode while each page is asked ten times a second, or one request alone. Work is told per second of processor time as
well, which says the same on a machine that others use; ratios are medians over pairs of turns.

    PYTHONPATH=benchmarks python benchmarks/engine_apart.py           # smollm2, below four minutes
    PYTHONPATH=benchmarks python benchmarks/engine_apart.py --tiny    # a model of nothing: only what lies around it
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
from reliability.check import ms, percentile
from reliability.control_plane import PATHS, probing, saturating
from reliability.running import Server, ask, client, prompts, serving, tiny_model

KINDS = ("process", "thread")
ALONE_TOKENS = 64
BOUND_S = 0.05  # for a page


@dataclass(frozen=True, slots=True)
class Turn:
    """What came out of one."""

    tokens: int
    seconds: float
    processor_s: float

    @property
    def per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def per_processor_s(self) -> float:
        return self.tokens / self.processor_s


@dataclass(slots=True)
class Side:
    """All turns of one kind of server."""

    saturated: list[Turn] = field(default_factory=list)
    alone: list[Turn] = field(default_factory=list)
    pages: dict[str, list[float]] = field(default_factory=lambda: {path: [] for path in PATHS})
    resident: int = 0  # bytes, with all children


async def saturated(server: Server, side: Side, seconds: float) -> int:
    """Returns the tokens that came."""
    async with saturating(server, words=12, tokens=2000) as answers:
        before = sum(one.tokens for one in answers)
        for path, taken in (await probing(server, seconds)).items():
            side.pages[path] += taken
        return sum(one.tokens for one in answers) - before


async def alone(server: Server) -> int:
    async with client() as http:
        answer = await ask(http, server.url, prompts(1)[0], ALONE_TOKENS)
    assert answer.complete, answer.error
    return ALONE_TOKENS


async def turn(server: Server, work: Callable[[], Awaitable[int]]) -> Turn:
    begin, processor_s = time.monotonic(), processor_of(server)
    tokens = await work()
    return Turn(tokens, time.monotonic() - begin, processor_of(server) - processor_s)


def family(server: Server) -> list[psutil.Process]:
    process = psutil.Process(server.process.pid)
    return [process, *process.children(recursive=True)]


def processor_of(server: Server) -> float:
    """Seconds of processor time, of the server and what it started."""
    return float(sum(one.cpu_times().user + one.cpu_times().system for one in family(server)))


async def compare(model: str, folder: Path, turns: int, seconds: float) -> dict[str, Side]:
    sides = {kind: Side() for kind in KINDS}
    async with AsyncExitStack() as stack:
        servers = {kind: await stack.enter_async_context(serving(model, folder, "--engine", kind)) for kind in KINDS}
        for server in servers.values():
            await alone(server)  # what is made at the first request
        for at in range(turns):
            for kind in KINDS if at % 2 else reversed(KINDS):
                side, server = sides[kind], servers[kind]
                side.saturated.append(await turn(server, lambda: saturated(server, side, seconds)))  # noqa: B023
                side.alone.append(await turn(server, lambda: alone(server)))  # noqa: B023
            print(f"turn {at + 1} of {turns}", file=sys.stderr, flush=True)
        for kind, server in servers.items():
            sides[kind].resident = sum(one.memory_info().rss for one in family(server))
    return sides


def ratio(sides: dict[str, Side], what: Callable[[Side], list[float]]) -> float:
    """Process over thread, the median over pairs of turns."""
    return float(median(a / b for a, b in zip(*(what(sides[kind]) for kind in KINDS), strict=True)))


def table(sides: dict[str, Side]) -> str:
    """Rows of Markdown: what, process, thread, ratio."""
    figures: list[tuple[str, str, Callable[[Side], list[float]]]] = [
        ("tokens/s, 16 streams", ".1f", lambda side: [one.per_s for one in side.saturated]),
        ("the same per processor second", ".1f", lambda side: [one.per_processor_s for one in side.saturated]),
        ("tokens/s, one request", ".1f", lambda side: [one.per_s for one in side.alone]),
        ("the same per processor second", ".1f", lambda side: [one.per_processor_s for one in side.alone]),
        ("resident MiB", ".0f", lambda side: [side.resident / 2**20]),
    ]
    rows = ["| | process | thread | ratio |", "|---|---|---|---|"]
    for path in PATHS:
        cells = [spread(sides[kind].pages[path]) for kind in KINDS]
        rows.append(f"| {path} while saturated, p50 / p99 / worst | {' | '.join(cells)} | |")
    for name, form, what in figures:
        cells = [format(median(what(sides[kind])), form) for kind in KINDS]
        rows.append(f"| {name} | {' | '.join(cells)} | {ratio(sides, what):.3f} |")
    return "\n".join(rows)


def spread(taken: list[float]) -> str:
    return f"{ms(percentile(taken, 50))} / {ms(percentile(taken, 99))} / {ms(max(taken))} of {len(taken)}"


def held(side: Side) -> bool:
    return all(percentile(taken, 99) <= BOUND_S for taken in side.pages.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6, help="of each kind (default: 6)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn at saturation (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="a random model of a few thousand weights")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny_model(Path(folder) / "tiny")) if args.tiny else "smollm2"
        sides = asyncio.run(compare(model, Path(folder), args.turns, args.seconds))
    print(table(sides))
    for kind, side in sides.items():
        print(f"{kind}: p99 within {ms(BOUND_S)} {'held' if held(side) else 'NOT held'}")
    return 0 if held(sides["process"]) else 1


if __name__ == "__main__":
    sys.exit(main())
