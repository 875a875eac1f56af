"""Batches of requests: from a file of lines to files of answers. Functions over a connection; `runner` does the work.

    validating --> in_progress --> finalizing --> completed          each line is answered in a transaction of its own;
        |               |  '-----> expired                           the output files and the last status in one
      failed        cancelling --> cancelled

A line is answered at most once: whoever comes second changes nothing. An answer is stored as the line of the output
file that it will be.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.gateway.errors import bad
from headrace.gateway.state import files
from headrace.gateway.state.files import Page, missing, new_id

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MOST_LINES = 50_000
WINDOW_S = 24 * 3600
_MOST_ERRORS = 100  # of a file that is not valid
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_FIELDS = (
    "id, tenant, endpoint, input_file_id, total, status, created_s, expires_s, metadata, errors, output_file_id, "
    "error_file_id, in_progress_s, finalizing_s, completed_s, failed_s, expired_s, cancelling_s, cancelled_s, keep_s, "
    "key_id"
)


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose a batch is, and the key it came with; empty: none."""

    tenant: str
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    total: int
    status: str
    created_s: int
    expires_s: int
    metadata: str | None
    errors: str | None
    output_file_id: str | None
    error_file_id: str | None
    in_progress_s: int | None
    finalizing_s: int | None
    completed_s: int | None
    failed_s: int | None
    expired_s: int | None
    cancelling_s: int | None
    cancelled_s: int | None
    keep_s: int | None  # seconds that its output files are kept; None: until they are deleted
    key_id: str  # of the key that made it and that its lines are charged to; empty: of none


@dataclass(frozen=True, slots=True)
class Todo:
    number: int
    custom_id: str
    body: bytes


class Line(Struct):
    """A line of the input file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Annotated[str, Meta(max_length=128)]
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Bounds:
    line_bytes: int
    lines: int = MOST_LINES


_LINE = msgspec.json.Decoder(Line)


def create(
    connection: sqlite3.Connection,
    by: Sender,
    endpoint: str,
    input_file_id: str,
    metadata: str | None,
    keep_s: int | None,
    now_s: int,
) -> Batch:
    """Raises Refused."""
    if endpoint not in ENDPOINTS:
        raise bad(f"endpoint: choose one of {', '.join(ENDPOINTS)}.", "endpoint")
    if files.get(connection, by.tenant, input_file_id, now_s).purpose != "batch":
        raise bad("input_file_id: upload the file with the purpose 'batch'.", "input_file_id")
    batch_id = new_id("batch")
    connection.execute(
        "INSERT INTO batches (id, tenant, endpoint, input_file_id, total, status, created_s, expires_s, metadata,"
        " keep_s, key_id) VALUES (?, ?, ?, ?, 0, 'validating', ?, ?, ?, ?, ?)",
        (batch_id, by.tenant, endpoint, input_file_id, now_s, now_s + WINDOW_S, metadata, keep_s, by.key_id),
    )
    return get(connection, by.tenant, batch_id)


def get(connection: sqlite3.Connection, tenant: str, batch_id: str) -> Batch:
    """Raises Refused if it is not there."""
    query = f"SELECT {_FIELDS} FROM batches WHERE id = ? AND tenant = ?"
    row = connection.execute(query, (batch_id, tenant)).fetchone()
    if row is None:
        raise missing("batch", batch_id)
    return Batch(*row)


def counts(connection: sqlite3.Connection, batch: Batch) -> tuple[int, int]:
    """Lines that were answered, and lines that failed. Of a finished batch, `errors` remembers."""
    if batch.status not in UNFINISHED:
        done = json.loads(batch.errors or "{}").get("counts", (0, 0))
        return done[0], done[1]
    rows = connection.execute("SELECT ok, COUNT(*) FROM lines WHERE batch_id = ? GROUP BY ok", (batch.id,)).fetchall()
    found = dict(rows)
    return found.get(1, 0), found.get(0, 0)


def listed(connection: sqlite3.Connection, tenant: str, page: Page) -> tuple[Sequence[Batch], bool]:
    """A page of the batches, and whether there are more."""
    rows = files.paged(connection, "batches", _FIELDS, "tenant = ?", (tenant,), page)
    return [Batch(*row) for row in rows[: page.limit]], len(rows) > page.limit


def cancel(connection: sqlite3.Connection, tenant: str, batch_id: str, now_s: int) -> Batch:
    """Raises Refused if it is not there or has ended."""
    batch = get(connection, tenant, batch_id)
    if batch.status in ("validating", "in_progress"):
        _move(connection, batch_id, "cancelling", now_s)
    elif batch.status not in ("cancelling", "cancelled"):
        raise bad(f"The batch is {batch.status} and cannot be cancelled.", "batch_id")
    return get(connection, tenant, batch_id)


def unfinished(connection: sqlite3.Connection) -> Batch | None:
    """The oldest batch that has something left to do."""
    marks = ", ".join("?" for _ in UNFINISHED)
    query = f"SELECT {_FIELDS} FROM batches WHERE status IN ({marks}) ORDER BY rowid LIMIT 1"
    row = connection.execute(query, UNFINISHED).fetchone()
    return None if row is None else Batch(*row)


def validate(connection: sqlite3.Connection, batch: Batch, bounds: Bounds, now_s: int) -> None:
    """Turn the input file into lines to answer; or fail the batch, saying what is wrong and where."""
    connection.execute("DELETE FROM lines WHERE batch_id = ?", (batch.id,))
    try:
        _, content = files.content(connection, batch.tenant, batch.input_file_id, now_s)
    except Exception:
        errors: list[dict[str, Any]] = [_error("The input file is not there any more.", "file_not_found")]
        lines: list[tuple[int, Line]] = []
    else:
        lines, errors = read(content, batch.endpoint, bounds)
    if errors:
        connection.execute("UPDATE batches SET errors = ? WHERE id = ?", (json.dumps({"data": errors}), batch.id))
        _move(connection, batch.id, "failed", now_s)
        return
    connection.executemany(
        "INSERT INTO lines (batch_id, number, custom_id, body) VALUES (?, ?, ?, ?)",
        ((batch.id, number, line.custom_id, bytes(line.body)) for number, line in lines),
    )
    connection.execute("UPDATE batches SET total = ? WHERE id = ?", (len(lines), batch.id))
    _move(connection, batch.id, "in_progress", now_s)


def read(content: bytes, endpoint: str, bounds: Bounds) -> tuple[list[tuple[int, Line]], list[dict[str, Any]]]:
    """The lines of an input file with their numbers, and what is wrong with it."""
    found: list[tuple[int, Line]] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            line = _read_line(text, endpoint, bounds, seen)
        except ValueError as error:
            errors.append(_error(*error.args[:3], line=number))
            if len(errors) >= _MOST_ERRORS:
                break
            continue
        seen.add(line.custom_id)
        found.append((number, line))
        if len(found) > bounds.lines:
            return [], [_error(f"The file has more than {bounds.lines} lines.", "too_many_lines")]
    if not (found or errors):
        errors = [_error("The file has no lines.", "empty_file")]
    return found, errors


def _read_line(text: bytes, endpoint: str, bounds: Bounds, seen: set[str]) -> Line:
    """Raises ValueError(message, code, param)."""
    if len(text) > bounds.line_bytes:
        raise ValueError(f"This line is larger than {bounds.line_bytes} bytes.", "line_too_large", None)
    try:
        text.decode()
        line = _LINE.decode(text)
    except msgspec.ValidationError as error:
        raise ValueError(f"This line is not a request: {error}.", "invalid_request", None) from error
    except (ValueError, RecursionError) as error:
        raise ValueError("This line is not parseable as JSON in UTF-8.", "invalid_json_line", None) from error
    if line.url != endpoint:
        raise ValueError("The url of this line is not the batch's endpoint.", "mismatched_endpoint", "url")
    if line.custom_id in seen:
        raise ValueError("The custom_id of this line was used before.", "duplicate_custom_id", "custom_id")
    return line


def _error(message: str, code: str, param: str | None = None, *, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def todo(connection: sqlite3.Connection, batch_id: str, after: int, limit: int) -> list[Todo]:
    """The next lines without an answer."""
    rows = connection.execute(
        "SELECT number, custom_id, body FROM lines WHERE batch_id = ? AND number > ? AND ok IS NULL"
        " ORDER BY number LIMIT ?",
        (batch_id, after, limit),
    )
    return [Todo(*row) for row in rows]


def answer(connection: sqlite3.Connection, batch_id: str, number: int, ok: bool, line: bytes) -> bool:
    """Store what became of a line; False if it has an answer already."""
    changed = connection.execute(
        "UPDATE lines SET ok = ?, answer = ? WHERE batch_id = ? AND number = ? AND ok IS NULL",
        (int(ok), line, batch_id, number),
    )
    return changed.rowcount == 1


def output_line(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """What became of a request, as a line of an output file."""
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return msgspec.json.encode({"id": _line_id(), "custom_id": custom_id, "response": response, "error": None})


def _unanswered_line(custom_id: str, code: str, message: str) -> bytes:
    error = {"code": code, "message": message}
    return msgspec.json.encode({"id": _line_id(), "custom_id": custom_id, "response": None, "error": error})


def _line_id() -> str:
    return f"batch_req_{secrets.token_hex(16)}"


def finalize(connection: sqlite3.Connection, batch: Batch, last: str, now_s: int) -> None:
    """Write the output files and end the batch as `last`: completed, expired or cancelled; all of it or nothing."""
    if last == "expired":
        _refuse_the_rest(connection, batch)
    completed, failed = counts(connection, batch)
    connection.execute("UPDATE batches SET finalizing_s = COALESCE(finalizing_s, ?) WHERE id = ?", (now_s, batch.id))
    for column, ok in (("output_file_id", 1), ("error_file_id", 0)):
        file_id = _write_file(connection, batch, ok, now_s)
        connection.execute(f"UPDATE batches SET {column} = ? WHERE id = ?", (file_id, batch.id))
    summary = json.dumps({"counts": [completed, failed]})
    connection.execute("UPDATE batches SET errors = ? WHERE id = ?", (summary, batch.id))
    connection.execute("DELETE FROM lines WHERE batch_id = ?", (batch.id,))
    _move(connection, batch.id, last, now_s)


def _refuse_the_rest(connection: sqlite3.Connection, batch: Batch) -> None:
    message = "This request could not be executed before the completion window expired."
    rows = connection.execute(
        "SELECT number, custom_id FROM lines WHERE batch_id = ? AND ok IS NULL", (batch.id,)
    ).fetchall()
    for number, custom_id in rows:
        answer(connection, batch.id, number, False, _unanswered_line(custom_id, "batch_expired", message))


def _write_file(connection: sqlite3.Connection, batch: Batch, ok: int, now_s: int) -> str | None:
    """One of the output files, piece by piece; None if it would be empty."""
    where = "FROM lines WHERE batch_id = ? AND ok = ?"
    size = connection.execute(f"SELECT SUM(LENGTH(answer) + 1) {where}", (batch.id, ok)).fetchone()[0]
    if not size:
        return None
    name = f"{batch.id}_{'output' if ok else 'error'}.jsonl"
    file = files.add(connection, batch.tenant, "batch_output", name, b"", now_s, batch.keep_s)
    connection.execute("UPDATE files SET bytes = ?, content = zeroblob(?) WHERE id = ?", (size, size, file.id))
    (row,) = connection.execute("SELECT rowid FROM files WHERE id = ?", (file.id,)).fetchone()
    with connection.blobopen("files", "content", row) as blob:
        for piece in _answers(connection, batch.id, ok):
            blob.write(piece + b"\n")
    return file.id


def _answers(connection: sqlite3.Connection, batch_id: str, ok: int) -> Iterable[bytes]:
    query = "SELECT answer FROM lines WHERE batch_id = ? AND ok = ? ORDER BY number"
    return (answer for (answer,) in connection.execute(query, (batch_id, ok)))


def _move(connection: sqlite3.Connection, batch_id: str, status: str, now_s: int) -> None:
    assert status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    connection.execute(
        f"UPDATE batches SET status = ?, {status}_s = ? WHERE id = ?",
        (status, now_s, batch_id),
    )
