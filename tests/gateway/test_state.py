"""Files and batches: what is on the disk, what a kill at any moment leaves, and what clients may not do."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import RoteService, ask, make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import Bytes, GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.types import Overloaded
from headrace.gateway import multipart
from headrace.gateway.app import build
from headrace.gateway.endpoints import Extras
from headrace.gateway.errors import Refused, bad
from headrace.gateway.replies import error_body
from headrace.gateway.state import batches, files
from headrace.gateway.state.batches import Bounds
from headrace.gateway.state.database import BadState, CannotStore, Database
from headrace.gateway.state.runner import Runner

BOUNDS = Bounds(10_000, 100)
URL = "/v1/completions"


def line(custom_id: str, body: Any = None, **more: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": body or {}} | more).encode()


def form(content: bytes, purpose: str = "batch", name: str = "in.jsonl") -> tuple[bytes, dict[str, str]]:
    head = f'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--b\r\n'
    head += f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}


async def create(database: Database, content: bytes) -> batches.Batch:
    def work(connection: Any) -> batches.Batch:
        file = files.add(connection, "", "batch", "in", content, 1, None)
        return batches.create(connection, batches.Sender(""), URL, file.id, None, None, 2_000_000_000)

    return await database.write(work)


async def output(database: Database, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    _, content = await database.read(lambda at: files.content(at, "", file_id, 1))
    return [json.loads(one) for one in content.splitlines()]


async def run_until(
    database: Database,
    batch_id: str,
    reply: Callable[[str, bytes, str], Awaitable[tuple[str, bytes]]],
    stop: int | None,
) -> batches.Batch:
    """Run until the batch has ended, or until `stop` lines have been asked; then drop everything at once."""
    asked = 0
    enough = asyncio.Event()

    async def counted(url: str, body: bytes, tenant: str) -> tuple[str, bytes]:
        nonlocal asked
        asked += 1
        if asked == stop:
            enough.set()
        return await reply(url, body, tenant)

    running = asyncio.create_task(Runner(database, counted, error_body, BOUNDS, 3).run())
    try:
        while not enough.is_set():
            batch = await database.read(lambda at: batches.get(at, "", batch_id))
            if batch.status not in batches.UNFINISHED:
                break
            await asyncio.sleep(0)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return await database.read(lambda at: batches.get(at, "", batch_id))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.lists(st.integers(1, 8), max_size=4), st.sets(st.integers(0, 11)))
def test_whenever_it_stops_every_line_is_in_the_output_once(lines: int, stops: list[int], wrong: set[int]) -> None:
    answers: Counter[str] = Counter()

    async def reply(_url: str, body: bytes, _tenant: str) -> tuple[str, bytes]:
        number = json.loads(body)["n"]
        await asyncio.sleep(0)
        if number in wrong:
            raise bad("no")
        answers[f"l{number}"] += 1
        return "id", b'{"number":%d,"time":%d}' % (number, answers[f"l{number}"])

    async def main(folder: Path) -> None:
        database = Database(folder)
        batch = await create(database, b"\n".join(line(f"l{n}", {"n": n}) for n in range(lines)))
        for stop in (*stops, None):
            batch = await run_until(database, batch.id, reply, stop)
            database.close()
            database = Database(folder)
        good, failed = await output(database, batch.output_file_id), await output(database, batch.error_file_id)
        assert batch.status == "completed"
        expected = {f"l{n}" for n in range(lines)}
        assert Counter(one["custom_id"] for one in good + failed) == Counter(expected)
        assert {one["custom_id"] for one in failed} == expected & {f"l{n}" for n in wrong}
        assert await database.read(lambda at: batches.counts(at, batch)) == (len(good), len(failed))
        database.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))


def test_what_is_wrong_only_now_is_tried_again(tmp_path: Path) -> None:
    tries = 0

    async def reply(_url: str, _body: bytes, _tenant: str) -> tuple[str, bytes]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Overloaded("full", 1.0)
        return "id", b"{}"

    async def main() -> None:
        database = Database(tmp_path)
        batch = await create(database, line("a"))
        batch = await run_until(database, batch.id, reply, None)
        assert (batch.status, tries) == ("completed", 2)
        database.close()

    asyncio.run(main())


def test_a_batch_can_be_cancelled_and_expires(tmp_path: Path) -> None:
    async def stuck(_url: str, body: bytes, _tenant: str) -> tuple[str, bytes]:
        if json.loads(body)["n"]:
            await asyncio.Event().wait()
        return "id", b"{}"

    async def main() -> None:
        database = Database(tmp_path)
        content = line("a", {"n": 0}) + b"\n" + line("b", {"n": 1})
        batch = await create(database, content)
        await run_until(database, batch.id, stuck, 2)
        await database.write(lambda at: batches.cancel(at, "", batch.id, 5))
        ended = await run_until(database, batch.id, stuck, None)
        assert ended.status == "cancelled" and [
            one["custom_id"] for one in await output(database, ended.output_file_id)
        ]
        with pytest.raises(Refused):
            other = await create(database, content)
            await database.write(lambda at: at.execute("UPDATE batches SET expires_s = 1 WHERE id = ?", (other.id,)))
            expired = await run_until(database, other.id, stuck, None)
            errors = await output(database, expired.error_file_id)
            assert expired.status == "expired"
            assert {one["error"]["code"] for one in errors} == {"batch_expired"} and len(errors) == 2
            await database.write(lambda at: batches.cancel(at, "", other.id, 5))
        database.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "content,code",
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (b"{", "invalid_json_line"),
        (b"\xff\xfe", "invalid_json_line"),
        (b"[" * 5000, "invalid_request"),
        (b'{"custom_id":"a"}', "invalid_request"),
        (line("a", url="/v1/files"), "mismatched_endpoint"),
        (line("a", method="GET"), "invalid_request"),
        (line("a") + b"\n" + line("a"), "duplicate_custom_id"),
        (line("x" * 513), "invalid_request"),
        (line("a", {"x": "y" * 10_000}), "line_too_large"),
        (b"\n".join(line(f"{n}") for n in range(101)), "too_many_lines"),
    ],
)
def test_files_that_are_no_batches_fail_with_a_reason_and_a_line(content: bytes, code: str) -> None:
    lines, errors = batches.read(content, URL, BOUNDS)
    assert errors[0]["code"] == code and errors[0]["message"]
    assert len(lines) < 101


def full(database: Database, is_so: bool = True) -> None:
    """As if the disk had no page left, or had room again."""

    def work(connection: sqlite3.Connection) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages if is_so else 1_000_000}")

    asyncio.run(database.read(work))


def test_while_the_disk_is_full_a_batch_waits_and_asks_nothing_twice(tmp_path: Path) -> None:
    asked: Counter[bytes] = Counter()
    database = Database(tmp_path)
    batch = asyncio.run(create(database, b"\n".join(line(f"l{n}", {"n": n}) for n in range(3))))

    async def reply(_url: str, body: bytes, _tenant: str) -> tuple[str, bytes]:
        if not asked:
            await database.read(lambda connection: connection.execute("PRAGMA max_page_count = 1"))
        asked[body] += 1
        return "id", b'"%s"' % (b"x" * 5000)  # does not fit

    async def main() -> batches.Batch:
        running = asyncio.create_task(Runner(database, reply, error_body, BOUNDS, 3).run())
        while len(asked) < 3:
            await asyncio.sleep(0)
        with pytest.raises(CannotStore, match="disk is full"):
            await database.write(lambda at: files.add(at, "", "batch", "in", b"x" * 9000, 1, None))
        await database.read(lambda connection: connection.execute("PRAGMA max_page_count = 1000000"))
        while (now := await database.read(lambda at: batches.get(at, "", batch.id))).status in batches.UNFINISHED:
            assert not running.done()
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return now

    ended = asyncio.run(main())
    assert (ended.status, set(asked.values()), len(asked)) == ("completed", {1}, 3)
    assert len(asyncio.run(output(database, ended.output_file_id))) == 3
    database.close()


def test_a_full_disk_is_said_and_answers_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(tmp_path)
    app = build(RoteService(), make_text(), GatewaySettings(), Metrics(), Extras(database=database))

    def call(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, _, answer = asyncio.run(ask(app, path, json.dumps(body).encode(), "POST"))
        return status, json.loads(answer)

    full(database)
    body, headers = form(b"x" * 50_000, "user_data")
    status, sent, answer = asyncio.run(ask(app, "/v1/files", body, "POST", headers))
    assert status == 503 and b"the server can store nothing at the moment: its disk is full" in answer
    assert "retry-after" in sent
    assert str(tmp_path) in caplog.text and "make room" in caplog.text and str(tmp_path).encode() not in answer
    first = {"model": "rote", "input": "hello", "max_output_tokens": 4}
    answers = [call("/v1/responses", first) for _ in range(20)]  # some still fit into pages that there are
    assert [status for status, _ in answers] == [200] * 20
    assert call("/v1/responses", {**first, "previous_response_id": answers[-1][1]["id"]})[0] == 400  # it is not here
    full(database, False)
    assert asyncio.run(ask(app, "/v1/files", body, "POST", headers))[0] == 200
    database.close()


def test_a_second_server_is_kept_out(tmp_path: Path) -> None:
    database = Database(tmp_path)
    with pytest.raises(BadState, match="--state-dir"):
        Database(tmp_path)
    database.close()
    Database(tmp_path).close()


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite3").write_bytes(b"something else entirely, and long enough to have a header" * 20)
    with pytest.raises(BadState, match="move it away"):
        Database(tmp_path)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_files_over_http(tmp_path: Path) -> None:
    app = build(
        RoteService(), make_text(), GatewaySettings(max_file=Bytes(100)), Metrics(), Extras(database=Database(tmp_path))
    )

    def call(
        path: str, body: bytes = b"", method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        status, _, answer = asyncio.run(ask(app, path, body, method, headers))
        return status, answer

    body, headers = form(b"\x00\r\n--c\r\n\xff", "user_data", "../../etc/pass\\wd\x07")
    status, answer = call("/v1/files", body, "POST", headers)
    file = json.loads(answer)
    assert (status, file["filename"], file["bytes"]) == (200, "wd", 9)
    assert call(f"/v1/files/{file['id']}/content") == (200, b"\x00\r\n--c\r\n\xff")
    assert json.loads(call("/v1/files?purpose=user_data&limit=1")[1])["data"] == [file]
    assert json.loads(call("/v1/files?purpose=batch")[1])["data"] == []
    for hostile in ("..", "%2e%2e%2fstate.sqlite3", "file-' OR 1=1 --", "\x00", "file-" + "0" * 5000):
        assert call(f"/v1/files/{hostile}")[0] in (404, 431)
        assert call(f"/v1/files/{hostile}/content")[0] in (404, 431)
    for query in ("limit=0", "limit=x", "limit=-1", "order=up"):
        assert call(f"/v1/files?{query}")[0] in (200, 400)
    assert call("/v1/files", *_post(form(b"x" * 101)))[0] == 413
    assert call("/v1/files", *_post(form(b"x", "virus")))[0] == 400
    assert call("/v1/files", b"{}", "POST")[0] == 415
    assert call(f"/v1/files/{file['id']}", method="DELETE")[0] == 200
    assert call(f"/v1/files/{file['id']}")[0] == 404
    batch = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
    assert call("/v1/batches", json.dumps(batch).encode(), "POST")[0] == 404
    assert call("/v1/batches/batch_no/cancel", b"", "POST")[0] == 404


def _post(made: tuple[bytes, dict[str, str]]) -> tuple[bytes, str, dict[str, str]]:
    return made[0], "POST", made[1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_a_form_gives_back_the_bytes_that_went_in(content: bytes) -> None:
    if b"\r\n--b" not in content:
        assert multipart.read(form(content)[0], b"b")["file"].content == content


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_forms_are_refused_and_nothing_else(data: st.DataObject) -> None:
    body = form(b"abc")[0]
    at = data.draw(st.integers(0, len(body)))
    damaged = body[:at] + data.draw(st.binary(max_size=8)) + body[at + data.draw(st.integers(0, 8)) :]
    try:
        multipart.read(damaged, b"b")
    except Refused as error:
        assert error.status == 400
