"""Works through batches, the oldest first, some lines at a time, and survives being killed at any moment.

A line that is under way when the process dies has no answer yet and is asked again; one that has an answer is not.
Refusals that are about the moment (overload, a server that shuts down) are no answers, and while the disk is full the
answers that are there wait for room. Owns the tasks of the batch in
work; what is true of batches is in the database.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from headrace.core import clock
from headrace.gateway.errors import LOG, Refused, refused
from headrace.gateway.state import batches, files
from headrace.gateway.state.batches import Batch, Bounds, Sender, Todo
from headrace.gateway.state.database import CannotStore, Database

T = TypeVar("T")

Ask = Callable[[str, bytes, Sender], Awaitable[tuple[str, bytes]]]
"""(endpoint, body, whose it is) -> (request id, body of the answer); raises as handlers do."""

_ERROR_BODY = Callable[[Refused], bytes]
_MOMENTARY = (429, 503)
_RETRY_S = (0.25, 30.0)  # between attempts, doubling from the first to the second
_PAGE = 64  # lines read from the database at once


class Runner:
    """Whoever makes it runs `run()` as a task for as long as it should work."""

    def __init__(
        self, database: Database, ask: Ask, error_body: _ERROR_BODY, bounds: Bounds, side_by_side: int
    ) -> None:
        self._database = database
        self._ask = ask
        self._error_body = error_body
        self._bounds = bounds
        self._side_by_side = side_by_side
        self._work = asyncio.Event()  # something was created or cancelled: look again

    def wake(self) -> None:
        self._work.set()

    async def run(self) -> None:
        """Until cancelled; a batch that is in work goes on when the next runner starts."""
        while True:
            self._work.clear()
            now_s = int(clock.wall())
            await self._write(partial(_sweep, now_s))
            batch = await self._database.read(batches.unfinished)
            if batch is None:
                await self._work.wait()
            else:
                await self._advance(batch)

    async def _advance(self, batch: Batch) -> None:
        """One change of status, or some lines."""
        now_s = int(clock.wall())
        match batch.status:
            case "validating":
                await self._write(lambda at: batches.validate(at, batch, self._bounds, now_s))
            case "cancelling":
                await self._end(batch, "cancelled")
            case "in_progress" if now_s >= batch.expires_s:
                await self._end(batch, "expired")
            case "in_progress":
                await self._answer_lines(batch)
            case _:
                await self._end(batch, "completed")

    async def _end(self, batch: Batch, last: str) -> None:
        now_s = int(clock.wall())
        await self._write(lambda connection: batches.finalize(connection, batch, last, now_s))
        LOG.info("%s %s", batch.id, last)

    async def _answer_lines(self, batch: Batch) -> None:
        """Until all lines have an answer, the batch expires, or something else happened to it."""
        work = asyncio.ensure_future(self._all_lines(batch))
        watch = asyncio.ensure_future(self._watch(batch))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            complete = work.done() and not work.cancelled()
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if complete:
            work.result()  # raises what went wrong
            await self._end(batch, "completed")

    async def _all_lines(self, batch: Batch) -> None:
        lines: asyncio.Queue[Todo | None] = asyncio.Queue(maxsize=self._side_by_side)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed(batch, lines))
            for _ in range(self._side_by_side):
                group.create_task(self._worker(batch, lines))

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`Database.write`, as soon as the disk takes it."""
        wait_s = _RETRY_S[0]
        while True:
            try:
                return await self._database.write(work)
            except CannotStore:
                await clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _RETRY_S[1])

    async def _watch(self, batch: Batch) -> None:
        """Return when the batch is not to be worked on any more: cancelled, or out of time."""
        try:
            async with asyncio.timeout(max(0.0, batch.expires_s - clock.wall())):
                while True:
                    await self._work.wait()
                    self._work.clear()
                    now = await self._database.read(lambda at: batches.get(at, batch.tenant, batch.id))
                    if now.status != "in_progress":
                        return
        except TimeoutError:
            return

    async def _feed(self, batch: Batch, lines: asyncio.Queue[Todo | None]) -> None:
        after = 0
        while page := await self._database.read(partial(_todo, batch.id, after)):
            for line in page:
                await lines.put(line)
            after = page[-1].number
        for _ in range(self._side_by_side):
            await lines.put(None)

    async def _worker(self, batch: Batch, lines: asyncio.Queue[Todo | None]) -> None:
        while (line := await lines.get()) is not None:
            ok, answer = await self._one(batch, line)
            await self._write(partial(_answer, batch.id, line.number, ok, answer))

    async def _one(self, batch: Batch, line: Todo) -> tuple[bool, bytes]:
        """What becomes of a line. What is only wrong at this moment is tried again."""
        wait_s, sender = _RETRY_S[0], Sender(batch.tenant, batch.key_id)
        while True:
            try:
                request_id, body = await self._ask(batch.endpoint, line.body, sender)
                return True, batches.output_line(line.custom_id, 200, request_id, body)
            except Exception as error:
                refusal = refused(error)
                if refusal.status not in _MOMENTARY or refusal.retry_after_s is None:
                    body = self._error_body(refusal)
                    return False, batches.output_line(line.custom_id, refusal.status, "", body)
            await clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _RETRY_S[1])


def _sweep(now_s: int, connection: sqlite3.Connection) -> None:
    files.sweep(connection, now_s)


def _todo(batch_id: str, after: int, connection: sqlite3.Connection) -> list[Todo]:
    return batches.todo(connection, batch_id, after, _PAGE)


def _answer(batch_id: str, number: int, ok: bool, line: bytes, connection: sqlite3.Connection) -> bool:
    return batches.answer(connection, batch_id, number, ok, line)
