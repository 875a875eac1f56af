"""One SQLite database in WAL mode, used from one thread: what `write` has returned from is on the disk.

Decides durability and nothing else. Content lies in the database, so no name that a client gives ever becomes a path.
Owns the connection, its thread, and the lock that keeps a second server out of the directory.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from headrace.core.types import HeadraceError, Unavailable

LOG = logging.getLogger("headrace.gateway")

T = TypeVar("T")
_NOT_WRITTEN = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
_VERSION = 2
_SCHEMA = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, purpose TEXT NOT NULL, filename TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_s INTEGER NOT NULL, expires_s INTEGER, content BLOB NOT NULL
);
CREATE TABLE batches (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, endpoint TEXT NOT NULL, input_file_id TEXT NOT NULL,
    total INTEGER NOT NULL, status TEXT NOT NULL, created_s INTEGER NOT NULL, expires_s INTEGER NOT NULL,
    metadata TEXT, errors TEXT, output_file_id TEXT, error_file_id TEXT, in_progress_s INTEGER,
    finalizing_s INTEGER, completed_s INTEGER, failed_s INTEGER, expired_s INTEGER, cancelling_s INTEGER,
    cancelled_s INTEGER, keep_s INTEGER, key_id TEXT NOT NULL DEFAULT ''
);
CREATE INDEX unfinished ON batches (created_s)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE TABLE lines (
    batch_id TEXT NOT NULL REFERENCES batches (id), number INTEGER NOT NULL, custom_id TEXT NOT NULL,
    body BLOB NOT NULL, ok INTEGER, answer BLOB, PRIMARY KEY (batch_id, number)
);
CREATE INDEX answered ON lines (batch_id, ok);
CREATE TABLE responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, previous TEXT, created_s INTEGER NOT NULL, messages TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX age ON responses (created_s);
"""
_FROM_1 = "ALTER TABLE batches ADD COLUMN key_id TEXT NOT NULL DEFAULT '';"


class BadState(HeadraceError):
    """The state directory cannot be used; the message says why and what to do."""


class CannotStore(Unavailable):
    """The disk takes nothing more, or refuses; whatever needs no disk goes on."""


class Database:
    """`folder` is made if it is missing, readable by its owner alone. Raises BadState."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = _lock(folder)
        self._thread = ThreadPoolExecutor(1, "headrace-state")
        try:
            self._connection = self._thread.submit(_open, folder / "state.sqlite3").result()
        except BaseException:
            self.close()
            raise

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._connection)

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` as one transaction: durable once this returns, undone if it raises. Runs to its end even if nobody
        waits for it any more. Raises CannotStore."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work))

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:  # where the disk is full it has been undone already
                connection.execute("ROLLBACK")
            if _not_written(error):
                LOG.error("%s cannot be written: %s; make room on its disk", self.folder, error)
                what = "its disk is full" if _full(error) else "its disk refuses to write"
                raise CannotStore(f"the server can store nothing at the moment: {what}; try again later") from error
            raise
        return result

    def close(self) -> None:
        """What is under way ends first."""
        if hasattr(self, "_connection"):
            self._thread.submit(self._connection.close).result()
        self._thread.shutdown(wait=True)
        os.close(self._lock)


def _not_written(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_WRITTEN


def _full(error: BaseException) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def _lock(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BadState(f"cannot use the state directory {folder}: {error.strerror}; choose --state-dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise BadState(
            f"another server uses the state directory {folder}; give this one its own with --state-dir"
        ) from None
    return lock


def _open(path: Path) -> sqlite3.Connection:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        raise BadState(f"{path} cannot be written: {error.strerror}; choose --state-dir") from error
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # every commit waits for the disk
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_VERSION};COMMIT;")
        elif version == 1:
            connection.executescript(f"BEGIN;{_FROM_1}PRAGMA user_version = {_VERSION};COMMIT;")
        elif version != _VERSION:
            raise BadState(f"{path} is of version {version}, and this program knows {_VERSION}; choose --state-dir")
    except sqlite3.DatabaseError as error:
        connection.close()
        if _not_written(error):
            raise BadState(f"{path} cannot be written: {error}; make room on its disk or choose --state-dir") from error
        raise BadState(f"{path} cannot be read as a database: {error}; move it away or choose --state-dir") from error
    return connection
