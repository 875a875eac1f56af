"""Files of clients: kept, listed, handed out and deleted. Functions over a connection; `pages` speaks HTTP.

A file's content is bytes to us: a batch reads its lines when it runs. Ids are random, and a file that has expired is
not there any more.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.gateway.errors import Refused, bad

PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")
MOST_FILES = 10_000  # of one tenant
_FIELDS = "id, purpose, filename, bytes, created_s, expires_s"


@dataclass(frozen=True, slots=True)
class File:
    id: str
    purpose: str
    filename: str
    bytes: int
    created_s: int
    expires_s: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list a client wants to see."""

    limit: int
    after: str | None = None
    ascending: bool = False


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(16)}" if kind == "file" else f"{kind}_{secrets.token_hex(16)}"


def add(
    connection: sqlite3.Connection,
    tenant: str,
    purpose: str,
    filename: str,
    content: bytes,
    now_s: int,
    keep_s: int | None,
) -> File:
    """Raises Refused."""
    if purpose not in (*PURPOSES, "batch_output"):
        raise bad(f"purpose: choose one of {', '.join(PURPOSES)}.", "purpose")
    (count,) = connection.execute("SELECT COUNT(*) FROM files WHERE tenant = ?", (tenant,)).fetchone()
    if count >= MOST_FILES:
        raise Refused(413, f"There are {count} files; delete some first.", code="too_many_files")
    file = File(
        new_id("file"), purpose, plain(filename), len(content), now_s, None if keep_s is None else now_s + keep_s
    )
    connection.execute(
        "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (file.id, tenant, file.purpose, file.filename, file.bytes, file.created_s, file.expires_s, content),
    )
    return file


def check_room(connection: sqlite3.Connection, more_bytes: int, most_bytes: int) -> None:
    """Raises Refused if all files together would be too large."""
    (held,) = connection.execute("SELECT COALESCE(SUM(bytes), 0) FROM files").fetchone()
    if held + more_bytes > most_bytes:
        raise Refused(413, "There is no room for this file; delete others first.", code="storage_full")


def plain(filename: str) -> str:
    """A name to show: its last part, without control characters. It never names anything on this machine."""
    last = re.split(r"[\\/]", filename)[-1]
    return re.sub(r"[\x00-\x1f\x7f]", "", last)[:255] or "file"


def sweep(connection: sqlite3.Connection, now_s: int) -> None:
    """Delete what has expired."""
    connection.execute("DELETE FROM files WHERE expires_s <= ?", (now_s,))


def get(connection: sqlite3.Connection, tenant: str, file_id: str, now_s: int) -> File:
    """Raises Refused if it is not there."""
    row = connection.execute(
        f"SELECT {_FIELDS} FROM files WHERE id = ? AND tenant = ? AND COALESCE(expires_s > ?, 1)",
        (file_id, tenant, now_s),
    ).fetchone()
    if row is None:
        raise missing("file", file_id)
    return File(*row)


def content(connection: sqlite3.Connection, tenant: str, file_id: str, now_s: int) -> tuple[File, bytes]:
    """Raises Refused if it is not there."""
    file = get(connection, tenant, file_id, now_s)
    (found,) = connection.execute("SELECT content FROM files WHERE id = ?", (file_id,)).fetchone()
    return file, found


def delete(connection: sqlite3.Connection, tenant: str, file_id: str, now_s: int) -> None:
    """Raises Refused if it is not there. A batch that has begun has its own copy of its lines."""
    get(connection, tenant, file_id, now_s)
    connection.execute("DELETE FROM files WHERE id = ?", (file_id,))


def listed(
    connection: sqlite3.Connection, tenant: str, purpose: str | None, page: Page, now_s: int
) -> tuple[Sequence[File], bool]:
    """A page of the files, and whether there are more."""
    where = "tenant = ? AND COALESCE(expires_s > ?, 1) AND COALESCE(purpose = ?, 1)"
    rows = paged(connection, "files", _FIELDS, where, (tenant, now_s, purpose), page)
    return [File(*row) for row in rows[: page.limit]], len(rows) > page.limit


def paged(
    connection: sqlite3.Connection, table: str, fields: str, where: str, values: Sequence[object], page: Page
) -> list[tuple[Any, ...]]:
    """Rows in order of their making, newest first unless asked otherwise, and one more than the page has."""
    sign, order = (">", "ASC") if page.ascending else ("<", "DESC")
    after = f"AND rowid {sign} (SELECT rowid FROM {table} WHERE id = ?)" if page.after else ""
    query = f"SELECT {fields} FROM {table} WHERE {where} {after} ORDER BY rowid {order} LIMIT ?"
    bound = [*values, *([page.after] if page.after else []), page.limit + 1]
    return connection.execute(query, bound).fetchall()


def missing(kind: str, id: str) -> Refused:
    return Refused(404, f"No such {kind}: {plain(id)[:64]!r}.", code="not_found", param=f"{kind}_id")
