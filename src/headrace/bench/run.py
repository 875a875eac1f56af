"""Sends the load and collects the answers: a closed loop, an open loop, progress, and the order of a whole run.

The loops take `send` as an argument and time from `core.clock`, so they run under virtual time against a fake server.
In an open loop a request is sent when it is due, whatever became of the others, and its latency counts from then.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import httptools

from headrace import __version__
from headrace.bench.client import Client, Exchange
from headrace.bench.metrics import Record
from headrace.bench.page import page
from headrace.bench.report import Report, compare, from_json, read_json, save, table, write_text
from headrace.bench.settings import BenchSettings, parse_url
from headrace.bench.stream import digest, error_message
from headrace.bench.workload import Job, body, jobs, warmup_jobs, with_bodies
from headrace.core import clock
from headrace.core.clock import now, sleep
from headrace.core.types import HeadraceError

CLOSED_LOOP_CONCURRENCY = 8
_HELD_BYTES = 128 << 20  # answers kept unread until the run is over; later ones are read as they end

Send = Callable[[bytes], Awaitable[Exchange]]


class Unmeasurable(HeadraceError):
    """The server cannot be measured as asked: not there, no model, refuses the warm-up."""


class Tally:
    """Collects answers. Reads them after the run, because reading takes time from the server on a shared machine."""

    def __init__(self, total: int, start_s: float) -> None:
        self.total = total
        self.start_s = start_s
        self.sent = self.done = self.failed = 0
        self.server = ""  # the Server header
        self._unread: list[tuple[Exchange, Job, float, float]] = []
        self._held_bytes = 0
        self._read: list[Record] = []

    def add(self, exchange: Exchange, job: Job, due_s: float, lag_s: float) -> None:
        self.done += 1
        self.server = exchange.server or self.server
        self.failed += exchange.failure is not None or exchange.status != 200
        self._held_bytes += exchange.body_bytes
        if self._held_bytes <= _HELD_BYTES:
            self._unread.append((exchange, job, due_s, lag_s))
        else:
            self._read.append(digest(exchange, job, self.start_s, due_s, lag_s))

    def records(self) -> tuple[Record, ...]:
        """One per request, in the order they were sent. Reads what is still unread."""
        self._read += [digest(exchange, job, self.start_s, due, lag) for exchange, job, due, lag in self._unread]
        self._unread.clear()
        return tuple(sorted(self._read, key=lambda record: record.index))


async def closed_loop(pairs: Iterator[tuple[Job, bytes]], concurrency: int, send: Send, tally: Tally) -> None:
    """So many clients, each sends its next request when its last is answered. Latency counts from sending."""

    async def client() -> None:
        for job, request in pairs:  # shared: whoever is free takes the next
            tally.sent += 1
            exchange = await send(request)
            tally.add(exchange, job, exchange.sent_s, 0.0)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())


async def open_loop(pairs: Iterator[tuple[Job, bytes]], most: int | None, send: Send, tally: Tally) -> None:
    """Every request at its time, at most `most` in flight. Waiting for a place is part of the latency."""
    places: AbstractAsyncContextManager[object] = asyncio.Semaphore(most) if most else nullcontext()

    async def one(job: Job, request: bytes, due_s: float, lag_s: float) -> None:
        async with places:
            tally.sent += 1
            exchange = await send(request)
        tally.add(exchange, job, due_s, lag_s)

    async with asyncio.TaskGroup() as group:
        for job, request in pairs:
            due_s = tally.start_s + (job.at_s or 0.0)
            await sleep(max(0.0, due_s - now()))
            group.create_task(one(job, request, due_s, max(0.0, now() - due_s)))


async def run(settings: BenchSettings, err: TextIO | None = None) -> Report:
    """Measure the server. Raises HeadraceError for bad settings, traces and servers; requests that fail are counted,
    not raised. Progress goes to `err` if that is a terminal."""
    made = jobs(settings)
    client = Client(
        parse_url(settings.url),
        api_key=settings.api_key,
        timeout_s=settings.timeout,
        keep_alive=settings.keep_alive,
    )
    try:
        model = settings.model or await first_model(client, settings.url)
        await warm_up(settings, model, client, warmup_jobs(settings, made))
        return await _measure(settings, model, client, made, err)
    finally:
        client.close()


async def _measure(settings: BenchSettings, model: str, client: Client, made: list[Job], err: TextIO | None) -> Report:
    pairs = with_bodies(settings, model, made)
    path = completions_path(settings)
    date = datetime.fromtimestamp(clock.wall(), UTC).isoformat(timespec="seconds")
    cpu_s = _cpu_s()
    tally = Tally(len(made), now())

    async def send(request: bytes) -> Exchange:
        return await client.post(path, request)

    progress = asyncio.create_task(show_progress(tally, err)) if settings.progress and err and err.isatty() else None
    try:
        if settings.open_loop:
            await open_loop(pairs, settings.concurrency, send, tally)
        else:
            await closed_loop(pairs, settings.concurrency or CLOSED_LOOP_CONCURRENCY, send, tally)
    finally:
        if progress:
            progress.cancel()
    cpu_s = _cpu_s() - cpu_s
    return Report(date, model, tally.server, settings.public(), versions(), cpu_s, tally.records())


async def first_model(client: Client, url: str) -> str:
    """The name of the first model the server lists."""
    exchange = await client.get("/models")
    if exchange.failure:
        raise Unmeasurable(f"{exchange.failure.message}; is the server running, and is --url {url} right?")
    try:
        answer = json.loads(exchange.body)
        if exchange.status == 200:
            return str(answer["data"][0]["id"])
        reason = error_message(answer)
    except (ValueError, LookupError, TypeError, RecursionError):
        reason = "the answer is not a list of models"
    raise Unmeasurable(f"{url}/models says {exchange.status}: {reason}; give --model, or check --url and --api-key")


async def warm_up(settings: BenchSettings, model: str, client: Client, made: list[Job]) -> None:
    """Send some requests one after the other. A failure ends the run at once: usually all would fail the same way."""
    for job in made:
        exchange = await client.post(completions_path(settings), body(settings, model, job))
        failure = digest(exchange, job, exchange.sent_s, exchange.sent_s, 0.0).failure
        if failure:
            raise Unmeasurable(f"a warm-up request failed ({failure.kind}): {failure.message}; --warmup 0 skips them")


def completions_path(settings: BenchSettings) -> str:
    return "/chat/completions" if settings.endpoint == "chat" else "/completions"


async def show_progress(tally: Tally, err: TextIO) -> None:
    """Rewrite one line twice a second until cancelled, then erase it."""
    try:
        while True:
            err.write(f"\r\x1b[K{progress_line(tally, now() - tally.start_s)}")
            err.flush()
            await sleep(0.5)
    finally:
        err.write("\r\x1b[K")
        err.flush()


def progress_line(tally: Tally, elapsed_s: float) -> str:
    share = tally.done / tally.total
    bar = ("━" * round(24 * share)).ljust(24, "╌")
    rate = tally.done / elapsed_s if elapsed_s > 0 else 0.0
    left = f"{(tally.total - tally.done) / rate:.0f} s left" if rate else "waiting"
    failed = f", {tally.failed} failed" if tally.failed else ""
    flying = f"{tally.sent - tally.done} in flight"
    return f"{bar} {tally.done}/{tally.total}{failed}, {flying}, {rate:.1f} requests/s, {left}"


def versions() -> dict[str, str]:
    """What made the load."""
    return {
        "headrace": __version__,
        "python": platform.python_version(),
        "httptools": httptools.__version__,
        "platform": platform.platform(),
    }


def main(settings: BenchSettings, out: TextIO | None = None, err: TextIO | None = None) -> int:
    """`headrace bench`: measure or compare, print a table, write the files. 0 if every request was answered."""
    out, err = out or sys.stdout, err or sys.stderr
    if settings.compare:
        return _compare(settings, out)
    report = clock.run(run(settings, err))
    out.write(table(report))
    if settings.save:
        save(report, settings.save)
    if settings.html:
        write_text(settings.html, page([("this run", report)]))
    return 0 if all(record.ok for record in report.records) else 1


def _compare(settings: BenchSettings, out: TextIO) -> int:
    names = short_names(settings.compare)
    named = [(name, read_json(path)) for name, path in zip(names, settings.compare, strict=True)]
    out.write(compare(named))
    if settings.html:
        write_text(settings.html, page([(name, from_json(value)) for name, value in named]))
    return 0


def short_names(paths: tuple[Path, ...]) -> list[str]:
    """File names without their ending; the whole path where two are the same."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def _cpu_s() -> float:
    """Processor seconds this process has used."""
    used = os.times()
    return used.user + used.system
