"""Lines of batches that were acknowledged: killed servers, and logs whose last bytes never reached the disk."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

from batch_kill import survive

from headrace.gateway.state import batches, files
from headrace.gateway.state.database import Database
from reliability.check import Found, Setting

_LINE = b'{"custom_id": "%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}\n'


async def kept(setting: Setting) -> Found:
    """acknowledged lines of a batch survive kill -9, each answered once; a torn tail of the log loses no acknowledged
    line"""
    lines, kills, cuts = (40, 2, 60) if setting.short else (500, 10, 2000)
    flags = [setting.model, "--kv-memory", "64MiB", "--max-context", "512", "--embedding-model", "none", *setting.flags]
    wrong = await asyncio.to_thread(survive, flags, lines, 4, kills, 0)
    torn = await enumerated(setting.folder / "log", 30, cuts)
    told = f"{lines} lines, {kills} kills: {'each answered once' if not wrong else wrong[0]}; "
    told += f"{cuts:,} cuts of the log: {len(torn)} lost a line or could not be opened"
    return Found("; ".join([told, *torn[:1]]), not wrong and not torn)


async def enumerated(folder: Path, lines: int, cuts: int) -> list[str]:
    """Answer a batch line by line, noting how long the log was after each acknowledgement. Then cut the log at any byte
    after some acknowledgement, as a crash would, every second time with noise behind, and open what is left."""
    database = Database(folder)
    log, answered = folder / "state.sqlite3-wal", list[int]()
    try:
        batch = await database.write(lambda at: created(at, lines))
        for number in range(1, lines + 1):
            assert await database.write(partial(acknowledge, batch.id, number))
            answered.append(log.stat().st_size)
        kept_log, kept_file = log.read_bytes(), (folder / "state.sqlite3").read_bytes()
    finally:
        database.close()
    rng, wrong = random.Random(0), list[str]()
    for cut in range(cuts):
        length = rng.choice(answered) + rng.choice((0, 1, rng.randrange(5000)))
        noise = rng.randbytes(rng.randrange(5000)) if cut % 2 else b""
        acknowledged = sum(size <= length for size in answered)
        found = await asyncio.to_thread(reopened, folder / "cut", kept_file, kept_log[:length] + noise)
        if found != "ok" and (not isinstance(found, int) or found < acknowledged):
            wrong.append(f"the log cut at {length}: {found} of {acknowledged}")
    return wrong


def acknowledge(batch_id: str, number: int, connection: sqlite3.Connection) -> bool:
    return batches.answer(connection, batch_id, number, True, b"{}")


def created(connection: sqlite3.Connection, lines: int) -> Any:
    """A batch whose lines wait."""
    content = b"".join(_LINE % number for number in range(lines))
    file = files.add(connection, "", "batch", "in", content, 1, None)
    batch = batches.create(connection, batches.Sender(""), "/v1/completions", file.id, None, None, 2_000_000_000)
    batches.validate(connection, batch, batches.Bounds(10_000, 100), 1)
    return batch


def reopened(folder: Path, file: bytes, log: bytes) -> int | str:
    """How many lines have an answer; or why that cannot be said."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    (folder / "state.sqlite3").write_bytes(file)
    (folder / "state.sqlite3-wal").write_bytes(log)
    try:
        Database(folder).close()  # as a server opens it
        with sqlite3.connect(folder / "state.sqlite3") as connection:
            (sound,) = connection.execute("PRAGMA integrity_check").fetchone()
            (count,) = connection.execute("SELECT COUNT(*) FROM lines WHERE ok = 1").fetchone()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return int(count) if sound == "ok" else str(sound)
