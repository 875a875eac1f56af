"""A server at saturation for as long as you like, with clients who hang up at random: does its memory grow, do its
descriptors and threads, and is every answer still the right one?

First every prompt is asked alone, on an idle server: those answers are the references. Then more clients than the
server computes side by side ask them again and again, with the same seeds; three in ten hang up at a random moment.
Meanwhile memory, descriptors and threads of the server and of what it started are read; the first quarter is warm-up.
The processor time it used says that it was never short of work.

    PYTHONPATH=benchmarks python benchmarks/soak.py --minutes 20
    PYTHONPATH=benchmarks python -m reliability R7                # the same, as a row of the reliability table
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
from reliability.check import Found, Setting
from reliability.running import Answer, Server, ask, client, prompts, serving, tiny_model

CLIENTS, AT_ONCE = 24, 8  # who ask, and who is computed side by side: the rest waits
ABORTS = 0.3
WARM_UP = 0.25  # of the time
MOST_MIB_PER_HOUR = 0.5
LONG_MINUTES = 10.0
MOST_GROWTH = 0.01  # of the memory, over the whole time
PATIENCE_S = 120.0  # who has no answer by then has lost it
BAR = 30  # characters
# What is kept for explanations is full within the warm-up, and what is kept of KV as well.
FLAGS = ("--max-running", str(AT_ONCE), "--kv-memory", "64MiB", "--explained", "200", "--max-context", "1024")


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    resident: int  # bytes
    descriptors: int
    threads: int
    processor_s: float


@dataclass(slots=True)
class Tally:
    right: int = 0
    right_s: float = 0.0  # that they took altogether
    aborted: int = 0
    minutes: int = 0  # that have been told of
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{self.right:,} right, {len(self.wrong)} wrong, {len(self.lost)} lost"
        return f"{counts}, {self.aborted:,} hung up"


async def soaked(setting: Setting) -> Found:
    """20 minutes at saturation with random aborts: no wrong and no lost answer, memory grows by less than 0.5 MiB/h or
    as good as that can be known, descriptors and threads stay, and no KV block is held at the end"""
    return await soak(setting, 0.15 if setting.short else 20.0)


async def soak(setting: Setting, minutes: float) -> Found:
    async with serving(setting.model, setting.folder, *FLAGS, *setting.flags) as server, client() as http:
        questions = [
            Question(prompt, 4 + 5 * (at % 7), at) for at, prompt in enumerate(prompts(24, 10) + prompts(12, 90))
        ]
        references = [await ask(http, server.url, one.prompt, one.tokens, one.seed) for one in questions]
        missing = [one.error or str(one.status) for one in references if not one.complete]
        if missing:
            return Found(f"the references cannot be had: {missing[0]}", False)
        known = dict(zip(questions, (one.text for one in references), strict=True))
        tally, end_s = Tally(), time.monotonic() + 60 * minutes
        clients = [asking(http, server, known, random.Random(at), tally, end_s) for at in range(CLIENTS)]
        _, samples = await asyncio.gather(asyncio.gather(*clients), watching(server, tally, end_s))
        held = await blocks_held(http, server.url)
    return judged(samples, tally, held, minutes >= LONG_MINUTES)


async def asking(
    http: httpx.AsyncClient, server: Server, known: dict[Question, str], rng: random.Random, tally: Tally, end_s: float
) -> None:
    """One client, until the time is over."""
    questions = list(known)
    while time.monotonic() < end_s:
        one = rng.choice(questions)
        task = asyncio.create_task(ask(http, server.url, one.prompt, one.tokens, one.seed))
        aborts = rng.random() < ABORTS
        usual_s = tally.right_s / tally.right if tally.right else 0.5
        await asyncio.wait({task}, timeout=rng.uniform(0, usual_s) if aborts else PATIENCE_S)
        if task.done():
            noted(task.result(), known[one], tally)
            continue
        task.cancel()  # closes the connection
        await asyncio.gather(task, return_exceptions=True)
        if aborts:
            tally.aborted += 1
        else:
            tally.lost.append(f"no answer in {PATIENCE_S:g} s")


def noted(answer: Answer, reference: str, tally: Tally) -> None:
    if not answer.complete:
        tally.lost.append(answer.error or f"status {answer.status}")
    elif answer.text != reference:
        tally.wrong.append(f"{answer.text[:40]!r} instead of {reference[:40]!r}")
    else:
        tally.right += 1
        tally.right_s += answer.seconds


async def watching(server: Server, tally: Tally, end_s: float) -> list[Sample]:
    """600 samples, or less in less than 100 s; a bar shows how far it is."""
    begin_s, samples, process = time.monotonic(), list[Sample](), psutil.Process(server.process.pid)
    pause_s = max((end_s - begin_s) / 600, min(1.0, (end_s - begin_s) / 60))
    while time.monotonic() < end_s:
        await asyncio.sleep(pause_s)
        samples.append(sample(process, time.monotonic() - begin_s))
        show(samples[-1], end_s - begin_s, tally)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return samples


def show(now: Sample, whole_s: float, tally: Tally) -> None:
    """A line that stays where it is in a terminal; elsewhere one line a minute."""
    done = min(1.0, now.at_s / whole_s)
    bar = "#" * int(BAR * done) + "." * (BAR - int(BAR * done))
    told = f"[{bar}] {clock_of(now.at_s)} of {clock_of(round(whole_s))}  {tally}  {now.resident / 2**20:.0f} MiB"
    if sys.stderr.isatty():
        print(f"\r{told}", end="\x1b[K", file=sys.stderr, flush=True)
    elif int(now.at_s / 60) > tally.minutes:
        tally.minutes = int(now.at_s / 60)
        print(told, file=sys.stderr, flush=True)


def clock_of(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def sample(process: psutil.Process, at_s: float) -> Sample:
    all_of_it = [process, *process.children(recursive=True)]
    return Sample(
        at_s,
        sum(one.memory_info().rss for one in all_of_it),
        sum(one.num_fds() for one in all_of_it),
        sum(one.num_threads() for one in all_of_it),
        sum(one.cpu_times().user + one.cpu_times().system for one in all_of_it),
    )


async def blocks_held(http: httpx.AsyncClient, url: str) -> int:
    """KV blocks in use once nobody asks any more."""
    used = 0
    for _ in range(100):
        page = (await http.get(f"{url}/v1/steps?limit=1")).json()
        used = sum(model["used_blocks"] for model in page["memory"])
        if not used:
            break
        await asyncio.sleep(0.1)
    return used


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope by least squares, and half of its 95 % interval. Neighbouring samples are alike, so the residuals are taken
    for as many as there would be if each said something new: n (1 - r) / (1 + r), where r is their correlation."""
    n = len(xs)
    x, y = sum(xs) / n, sum(ys) / n
    spread = sum((one - x) ** 2 for one in xs)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread
    rest = [b - y - slope * (a - x) for a, b in zip(xs, ys, strict=True)]
    total = sum(one**2 for one in rest)
    alike = sum(a * b for a, b in pairwise(rest)) / total if total else 0.0
    worth = max(3.0, n * (1 - max(0.0, alike)) / (1 + max(0.0, alike)))
    return slope, 1.96 * math.sqrt(total / n / max(1.0, worth - 2) / (spread / n))


def judged(samples: Sequence[Sample], tally: Tally, held_blocks: int, long: bool) -> Found:
    """What a minute's growth comes to in an hour means nothing, so only a long run is held to that. What its interval
    does not exclude is not held against a server."""
    warm = [one for one in samples if one.at_s >= WARM_UP * samples[-1].at_s]
    per_s, about = line([one.at_s for one in warm], [float(one.resident) for one in warm])
    slope, interval = per_s * 3600 / 2**20, about * 3600 / 2**20
    resident = warm[-1].resident
    share = (warm[-1].at_s - warm[0].at_s) / resident
    flat = all(steady([getattr(one, what) for one in warm]) for what in ("descriptors", "threads"))
    busy = (warm[-1].processor_s - warm[0].processor_s) / (warm[-1].at_s - warm[0].at_s)
    told = [
        str(tally),
        f"memory {resident / 2**20:.0f} MiB, {slope:+.2f} ± {interval:.2f} MiB/h ({100 * per_s * share:+.2f} %)",
        f"descriptors {spread_of([one.descriptors for one in warm])}",
        f"threads {spread_of([one.threads for one in warm])}",
        f"{held_blocks} blocks held",
        f"{busy:.1f} cores busy",
        *tally.wrong[:1],
        *tally.lost[:1],
    ]
    kept = (per_s - about) * share <= MOST_GROWTH and not (long and slope - interval > MOST_MIB_PER_HOUR)
    fine = tally.right > 0 and not tally.wrong and not tally.lost and not held_blocks
    return Found("; ".join(told), kept and flat and fine)


def steady(counts: Sequence[int]) -> bool:
    """No more at the end than at the beginning: the least of the last third is no more than the most of the first."""
    third = max(1, len(counts) // 3)
    return min(counts[-third:]) <= max(counts[:third])


def spread_of(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", default="smollm2", help="as for headrace serve, or tiny: one made here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny_model(Path(folder) / "tiny")) if args.model == "tiny" else args.model
        found = asyncio.run(soak(Setting(False, model, Path(folder)), args.minutes))
    print(found.ours, "; held" if found.held else "; NOT held", sep="")
    return 0 if found.held else 1


if __name__ == "__main__":
    sys.exit(main())
