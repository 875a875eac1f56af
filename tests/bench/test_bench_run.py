"""The loops under virtual time against a fake `send`, and whole runs over real sockets."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import SSE_HEAD, Answer, Call, chunk, completion, fixed, openai, raw, serving

from headrace.bench.client import Exchange, Failure
from headrace.bench.metrics import Record
from headrace.bench.report import Report
from headrace.bench.run import Tally, Unmeasurable, closed_loop, main, open_loop, progress_line, run, show_progress
from headrace.bench.settings import BenchSettings
from headrace.bench.workload import Job
from headrace.core import clock


class FakeSend:
    """Answers with a token every `gap_s`, as many as asked; knows how many were in flight at most."""

    def __init__(self, gap_s: float = 1.0, tokens: int = 3, stall_s: float = 0.0) -> None:
        self.gap_s, self.tokens, self.stall_s = gap_s, tokens, stall_s
        self.in_flight = self.most = 0

    async def __call__(self, request: bytes) -> Exchange:
        exchange = Exchange(clock.now(), status=200)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        for part in completion(self.tokens)[: self.tokens]:
            await clock.sleep(self.gap_s)
            exchange.chunks.append((clock.now(), part))
        exchange.ended_s = clock.now()
        self.in_flight -= 1
        return exchange


def pairs(times: list[float | None]) -> Iterator[tuple[Job, bytes]]:
    return iter([(Job(i, at_s, (("x", 4),), 3), b"") for i, at_s in enumerate(times)])


def looped(
    times: list[float | None], send: FakeSend, *, closed: int | None = None, most: int | None = None
) -> tuple[Record, ...]:
    async def body() -> tuple[Record, ...]:
        await clock.sleep(100.0)  # the clock's zero is not the run's
        tally = Tally(len(times), clock.now())
        if closed:
            await closed_loop(pairs(times), closed, send, tally)
        else:
            await open_loop(pairs(times), most, send, tally)
        assert (tally.sent, tally.done, tally.failed) == (len(times), len(times), 0)
        return tally.records()

    return clock.run(body(), virtual=True)


def test_exact_accounting_in_a_closed_loop() -> None:
    """Two clients, five requests of three seconds: starts at 0, 0, 3, 3, 6."""
    send = FakeSend()
    records = looped([None] * 5, send, closed=2)
    assert send.most == 2
    assert [record.sent_s for record in records] == [0, 0, 3, 3, 6]
    for record in records:
        assert record.token_times_s == (record.due_s + 1, record.due_s + 2, record.due_s + 3)
        assert (record.ttft_s, record.tpot_s, record.e2e_s, record.lag_s) == (1.0, 1.0, 3.0, 0.0)


def test_an_open_loop_sends_when_due_whatever_is_in_flight() -> None:
    send = FakeSend()
    records = looped([0.0, 0.5, 0.5, 2.0], send)
    assert [record.sent_s for record in records] == [record.due_s for record in records] == [0.0, 0.5, 0.5, 2.0]
    assert send.most == 4


def test_waiting_for_a_place_is_part_of_the_latency() -> None:
    """One place: the second request is due at 0.5 and sent at 3. No coordinated omission."""
    first, second, third = looped([0.0, 0.5, 1.0], FakeSend(), most=1)
    assert (first.ttft_s, first.e2e_s) == (1.0, 3.0)
    assert (second.due_s, second.sent_s, second.ttft_s, second.e2e_s) == (0.5, 3.0, 3.5, 5.5)
    assert (third.sent_s, third.e2e_s) == (6.0, 8.0)
    assert {record.lag_s for record in (first, second, third)} == {0.0}


def test_a_generator_that_falls_behind_says_by_how_much() -> None:
    async def body() -> tuple[Record, ...]:
        tally = Tally(2, clock.now() - 0.75)  # three quarters of a second were lost somewhere
        await open_loop(pairs([0.0, 1.0]), None, FakeSend(), tally)
        return tally.records()

    late, on_time = clock.run(body(), virtual=True)
    assert (late.lag_s, late.ttft_s) == (0.75, 1.75)
    assert (on_time.lag_s, on_time.ttft_s) == (0.0, 1.0)


def test_answers_beyond_what_is_held_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> tuple[Record, ...]:
        return looped([0.0, 1.0, 2.0], FakeSend())

    held = read()
    monkeypatch.setattr("headrace.bench.run._HELD_BYTES", -1)
    assert read() == held


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_says_what_matters_and_erases_itself() -> None:
    async def body() -> str:
        tally, terminal = Tally(10, clock.now()), FakeTerminal()
        tally.sent, tally.done, tally.failed = 7, 4, 1
        task = asyncio.create_task(show_progress(tally, terminal))
        await clock.sleep(2.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return terminal.getvalue()

    shown = clock.run(body(), virtual=True)
    assert "4/10, 1 failed, 3 in flight, 2.0 requests/s, 3 s left" in shown
    assert shown.endswith("\r\x1b[K")
    assert "waiting" in progress_line(Tally(10, 0.0), 0.0)


def measured(answer: Answer, **options: object) -> tuple[Report, list[Call]]:
    async def body() -> tuple[Report, list[Call]]:
        async with serving(answer) as server:
            settings = BenchSettings(url=server.url, **({"timeout": 5.0} | options))  # type: ignore[arg-type]
            return await run(settings), server.calls

    return clock.run(body())


def test_a_whole_run() -> None:
    report, calls = measured(openai, requests=12, concurrency=3, input="5:9", output="4", warmup=2, slo="ttft=5")
    summary = report.summary()
    assert (report.model, report.server) == ("tiny", "fake/1")
    assert (summary.completed, summary.failures, summary.short) == (12, {}, 0)
    assert (summary.output_tokens, summary.cached_tokens, summary.goodput_fraction) == (48, 12, 1.0)
    posts = [call.json for call in calls if call.method == "POST"]
    assert len(posts) == 14
    assert summary.prompt_tokens == sum(len(post["prompt"]) for post in posts[2:])
    assert all(post["ignore_eos"] and post["model"] == "tiny" for post in posts)


@pytest.mark.parametrize("options", [{"rate": 200.0}, {"rate": float("inf"), "concurrency": 2}, {"endpoint": "chat"}])
def test_whole_runs_of_other_kinds(options: dict[str, object]) -> None:
    report, calls = measured(openai, requests=6, output="2", input="3", model="m", **options)
    assert report.summary().completed == 6
    assert {call.path for call in calls} == {"/v1/chat/completions" if "endpoint" in options else "/v1/completions"}


def test_failures_are_counted_and_do_not_stop_the_run() -> None:
    async def moody(call: Call, writer: asyncio.StreamWriter) -> None:
        turn = len(turns)
        turns.append(call)
        if turn % 3 == 1:
            writer.write(fixed(b'{"error": {"message": "full"}}', "429 Too Many Requests"))
        elif turn % 3 == 2:
            writer.write(SSE_HEAD + chunk(completion(3)[0]))
            writer.close()
        else:
            await openai(call, writer)

    turns: list[Call] = []
    report, _ = measured(moody, requests=9, concurrency=1, output="3", warmup=0, model="m")
    summary = report.summary()
    assert summary.completed == 3
    assert summary.failures == {"http 429": 3, "closed early": 3}
    assert summary.output_tokens == 9


@pytest.mark.parametrize(
    ("answer", "options", "complaint"),
    [
        (raw(fixed(b'{"error": {"message": "no key"}}', "401 Unauthorized")), {}, "401: no key.*--api-key"),
        (raw(fixed(b"<html>")), {}, "not a list of models"),
        (raw(fixed(b'{"data": []}')), {}, "--model"),
        (raw(b"", close=True), {}, "is the server running"),
        (raw(fixed(b'{"detail": "ignore_eos?"}', "400 Bad Request")), {"model": "m"}, "http 400.*ignore_eos"),
    ],
)
def test_a_server_that_cannot_be_measured_ends_the_run(
    answer: Answer, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(Unmeasurable, match=complaint):
        measured(answer, **options)


def test_out_of_descriptors_is_a_connect_failure() -> None:
    failure = Failure("connect", os.strerror(24))
    tally = Tally(1, 0.0)
    tally.add(Exchange(0.0, 1.0, failure=failure), Job(0, None, (), 1), 0.0, 0.0)
    assert tally.failed == 1
    assert tally.records()[0].failure == failure


def test_main_writes_what_was_asked_and_returns_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` owns the event loop, so the server is measured from inside by a `run` that starts it."""

    async def with_server(settings: BenchSettings, err: object) -> Report:
        async with serving(openai) as server:
            return await run(BenchSettings(url=server.url, requests=4, output="3", seed=settings.seed))

    monkeypatch.setattr("headrace.bench.run.run", with_server)
    out, files = io.StringIO(), []
    for seed in (1, 2):
        saved = tmp_path / f"run{seed}.json"
        files.append(saved)
        assert main(BenchSettings(save=saved, html=tmp_path / "run.html", seed=seed), out, io.StringIO()) == 0
    assert "output tokens   12" in out.getvalue()
    assert json.loads(files[1].read_text())["seed"] == 2
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    assert main(BenchSettings(compare=tuple(files), html=tmp_path / "both.html"), out, io.StringIO()) == 0
    assert "run1" in out.getvalue() and "run2" in out.getvalue()
    assert "run2" in (tmp_path / "both.html").read_text()
