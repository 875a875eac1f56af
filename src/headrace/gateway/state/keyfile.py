"""The file of keys: hashes, limits and what was spent, in SQLite, so that an acknowledged change survives kill -9 and
several servers and the command line may use it at once. Owns the connections.

A server asks `current` before every request: it is the keys of this moment, read again only when they have changed.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.gateway.errors import LOG
from headrace.gateway.keys import BadKey, Key, Keyring, digest
from headrace.gateway.limits import Limits

MOST_KEYS = 100_000
_VERSION = 1
_SCHEMA = """
CREATE TABLE file (salt BLOB NOT NULL, changes INTEGER NOT NULL);
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, tenant TEXT NOT NULL, digest BLOB NOT NULL UNIQUE, admin INTEGER NOT NULL,
    models TEXT NOT NULL, limits TEXT NOT NULL, priority INTEGER NOT NULL, weight REAL NOT NULL,
    created_s INTEGER NOT NULL, expires_s INTEGER, revoked_s INTEGER
);
CREATE UNIQUE INDEX live ON keys (name) WHERE revoked_s IS NULL;
CREATE TABLE spent (key_id TEXT PRIMARY KEY REFERENCES keys (id), tokens INTEGER NOT NULL);
"""
_FIELDS = "id, name, tenant, digest, admin, models, limits, priority, weight, created_s, expires_s, revoked_s"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a new key shall be."""

    name: str
    tenant: str
    admin: bool = False
    models: tuple[str, ...] = ()
    limits: Limits = Limits()
    priority: int = 0
    weight: float = 1.0
    expires_s: int | None = None


class KeyFile:
    """May be missing until the first key is added. Raises BadKey where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: sqlite3.Connection | None = None
        self._inode = 0
        self._seen: tuple[int, int] = (-1, -1)  # SQLite's count of commits by others, and ours of changed keys
        self._ring = Keyring()
        self._trouble = False
        self._writer: ThreadPoolExecutor | None = None

    # -- for a server --------------------------------------------------------------------------------------------------

    def current(self) -> Keyring:
        """The keys of this moment. A file that cannot be read just now, or is gone, changes nothing."""
        try:
            self._refresh()
            self._trouble = False
        except (OSError, sqlite3.Error, BadKey) as error:
            if not self._trouble and not (isinstance(error, FileNotFoundError) and self._reader is None):
                LOG.error("the keys in %s cannot be read; those read before still hold: %s", self.path.name, error)
                self._trouble = True
        return self._ring

    def _refresh(self) -> None:
        inode = os.stat(self.path).st_ino
        if self._reader is None or inode != self._inode:
            fresh = _connect(self.path)
            if self._reader is not None:
                self._reader.close()
            self._reader, self._inode, self._seen = fresh, inode, (-1, -1)
        (commits,) = self._reader.execute("PRAGMA data_version").fetchone()
        if commits == self._seen[0]:
            return
        salt, changes = self._reader.execute("SELECT salt, changes FROM file").fetchone()
        if changes != self._seen[1]:
            self._ring = Keyring.of(salt, _keys(self._reader))
        self._seen = commits, changes

    def spent(self) -> Mapping[str, int]:
        """Tokens that each key has used of its budget."""
        if not self.path.exists():
            return {}
        with self._open() as connection:
            return dict(connection.execute("SELECT key_id, tokens FROM spent"))

    def charge(self, key_id: str, tokens: int) -> None:
        """Write it down soon, without waiting for it."""
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "headrace-keys")
        self._writer.submit(self._charge, key_id, tokens)

    def _charge(self, key_id: str, tokens: int) -> None:
        try:
            with self._open() as connection:
                connection.execute(
                    "INSERT INTO spent SELECT id, ? FROM keys WHERE id = ?"
                    " ON CONFLICT (key_id) DO UPDATE SET tokens = tokens + excluded.tokens",
                    (tokens, key_id),
                )
        except (OSError, sqlite3.Error, BadKey) as error:
            LOG.error("%d tokens of key %s could not be written down: %s", tokens, key_id, error)

    def close(self) -> None:
        """What is to be written is written first."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # -- for the command line ------------------------------------------------------------------------------------------

    def add(self, wanted: Wanted, secret: str, now_s: int) -> Key:
        """Durable once this returns. Raises BadKey."""
        self._make()
        with self._open() as connection:
            (salt,) = connection.execute("SELECT salt FROM file").fetchone()
            if connection.execute("SELECT COUNT(*) FROM keys").fetchone()[0] >= MOST_KEYS:
                raise BadKey(f"{self.path} has {MOST_KEYS} keys; start another file with --keys-file")
            key = Key(
                secrets.token_hex(4), wanted.name, wanted.tenant, digest(secret, salt), wanted.admin, wanted.models,
                wanted.limits, wanted.priority, wanted.weight, now_s, wanted.expires_s,
            )  # fmt: skip
            try:
                marks = ", ".join("?" * 12)
                connection.execute(f"INSERT INTO keys ({_FIELDS}) VALUES ({marks})", _row(key))
            except sqlite3.IntegrityError:
                raise BadKey(f"there is a key {wanted.name!r} already; revoke it or choose another name") from None
            connection.execute("UPDATE file SET changes = changes + 1")
        return key

    def revoke(self, name: str, now_s: int) -> Key:
        """Durable once this returns. Raises BadKey if no such key holds."""
        with self._open() as connection:
            key = self._find(connection, name)
            connection.execute("UPDATE keys SET revoked_s = ? WHERE id = ?", (now_s, key.id))
            connection.execute("UPDATE file SET changes = changes + 1")
        return key

    def find(self, name: str) -> Key:
        with self._open() as connection:
            return self._find(connection, name)

    def all(self) -> Sequence[Key]:
        """In the order of their making."""
        if not self.path.exists():
            return ()
        with self._open() as connection:
            return _keys(connection)

    def _find(self, connection: sqlite3.Connection, name: str) -> Key:
        found = [key for key in _keys(connection) if name in (key.name, key.id) and key.revoked_s is None]
        if not found:
            raise BadKey(f"there is no key {name!r} that holds; see `headrace keys list`")
        return found[0]

    def _make(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise BadKey(f"cannot write {self.path}: {error.strerror}; choose another file with --keys-file") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, and one transaction."""
        connection = _connect(self.path)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise BadKey(f"{self.path}: {error}; try again") from error
        finally:
            connection.close()  # undoes what was not committed


def _connect(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise BadKey(f"there is no file of keys at {path}; `headrace keys add NAME` begins one")
    try:
        connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # every commit waits for the disk
        connection.execute("PRAGMA trusted_schema = OFF")
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            _begin(connection)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise BadKey(f"{path} cannot be read as a file of keys: {error}; choose another with --keys-file") from error
    if version != _VERSION:
        connection.close()
        raise BadKey(f"{path} is of version {version}, and this program knows {_VERSION}")
    return connection


def _begin(connection: sqlite3.Connection) -> None:
    """An empty file gets its tables, by whoever comes first."""
    connection.execute("BEGIN IMMEDIATE")
    if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
        for statement in filter(str.strip, _SCHEMA.split(";")):
            connection.execute(statement)
        connection.execute("INSERT INTO file VALUES (?, 0)", (secrets.token_bytes(32),))
        connection.execute(f"PRAGMA user_version = {_VERSION}")
    connection.execute("COMMIT")


def _row(key: Key) -> tuple[Any, ...]:
    models, limits = json.dumps(key.models), json.dumps(asdict(key.limits))
    return (
        key.id, key.name, key.tenant, key.digest, int(key.admin), models, limits, key.priority, key.weight,
        key.created_s, key.expires_s, key.revoked_s,
    )  # fmt: skip


def _keys(connection: sqlite3.Connection) -> list[Key]:
    rows = connection.execute(f"SELECT {_FIELDS} FROM keys ORDER BY rowid").fetchall()
    return [_key(*row) for row in rows]


def _key(id: str, name: str, tenant: str, of: bytes, admin: int, models: str, limits: str, *rest: Any) -> Key:
    return Key(id, name, tenant, of, bool(admin), tuple(json.loads(models)), Limits(**json.loads(limits)), *rest)
