"""Recording: what is written, what never is, that it reads back, and that a full disk stops nothing but itself."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator

import pytest

from headrace.core import clock
from headrace.core.events import Admitted, Arrived, Finished, Rejected
from headrace.core.keys import block_keys
from headrace.core.ports import Capacity, Status
from headrace.core.types import SLO, FinishReason, Output, Overloaded, Request, RequestId, Tokens, Usage
from headrace.workload.arrival import Arrival
from headrace.workload.record import MOST_LIVE, Recorded, Recorder
from headrace.workload.traces import parse_trace

IDS = tuple(range(7000, 7100))


def make(name: str, ids: tuple[int, ...] = IDS, tenant: str = "") -> Request:
    keys = block_keys(ids, 16, tenant.encode())
    return Request(name, (Tokens(ids),), 0.0, 50, block_keys=keys, tenant=tenant, priority=2, slo=SLO(ttft_s=0.5))


def finish(recorder: Recorder, request: Request, at_s: float, tokens: int, reason: FinishReason, end_s: float) -> None:
    usage = Usage(request.prompt_tokens, tokens, 0)
    recorder.observe(Finished(end_s, request.id, reason, usage, at_s, at_s, at_s, request.max_new_tokens))


def record(*, secret: bytes = b"secret") -> tuple[str, list[Arrival]]:
    """Three requests: the second ends first, the third goes away."""
    file = io.StringIO()
    recorder = Recorder(file, 16, secret)
    requests = [make("a"), make("b", IDS[:40], "acme"), make("c", IDS[:60])]
    for at, request in enumerate(requests):
        recorder.note(request)
        recorder.observe(Arrived(100.0 + at, request.id, request.prompt_tokens, 50))
        recorder.observe(Admitted(100.0 + at, request.id, 0, 0.0, False))
    finish(recorder, requests[1], 101.0, 7, FinishReason.STOP, 103.0)
    finish(recorder, requests[0], 100.0, 50, FinishReason.LENGTH, 104.0)
    finish(recorder, requests[2], 102.0, 4, FinishReason.ABORT, 104.5)
    return file.getvalue(), list(parse_trace(file.getvalue().splitlines()))


def test_a_recording_reads_back_in_order_of_arrival() -> None:
    text, (a, b, c) = record()
    assert [one.at_s for one in (a, b, c)] == [0.0, 1.0, 2.0]
    assert [one.prompt_tokens for one in (a, b, c)] == [100, 40, 60]
    assert [one.output_tokens for one in (a, b)] == [50, 7]
    assert (c.cancel_s, c.output_tokens, c.max_new_tokens) == (2.5, 50, 50)
    assert {(one.priority, one.slo) for one in (a, b, c)} == {(2, SLO(ttft_s=0.5))}
    assert [json.loads(line)["end"] for line in text.splitlines()] == ["stop", "length", "abort"]


def test_a_recording_keeps_what_was_shared() -> None:
    """a and c begin alike; b says the same but belongs to another tenant."""
    _, (a, b, c) = record()
    assert [stretch.tokens for stretch in a.prompt] == [16] * 6 + [4]
    assert a.prompt[:3] == c.prompt[:3]
    assert {stretch.name for stretch in a.prompt[:-1]}.isdisjoint(stretch.name for stretch in b.prompt[:-1])
    assert a.prompt[-1].name is None
    assert b.tenant.startswith("t") and b.tenant != a.tenant == ""


def test_a_recording_has_no_content_and_nothing_to_match_it_with() -> None:
    text, rows = record()
    _, other_rows = record(secret=b"another")
    assert "acme" not in text
    for key in block_keys(IDS, 16, b""):
        assert str(key) not in text and f"{key:x}" not in text
    names, others = ({part.name for row in made for part in row.prompt} - {None} for made in (rows, other_rows))
    assert not names & others
    assert {name for line in text.splitlines() for name in json.loads(line)} == {
        *("at_s", "prompt_tokens", "output_tokens", "max_new_tokens", "end", "cancel_s", "block_tokens", "blocks"),
        *("tenant", "priority", "ttft_s"),
    }


def test_rejected_requests_are_written_and_left_out_by_the_reader() -> None:
    file = io.StringIO()
    recorder = Recorder(file, 16, b"s")
    recorder.note(make("r"))
    recorder.observe(Rejected(5.0, "r", "full"))
    recorder.observe(Rejected(5.0, "never noted", "full"))
    finish(recorder, make("unknown"), 6.0, 3, FinishReason.STOP, 7.0)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["end"] for line in lines] == ["rejected", "stop"]
    assert lines[0]["prompt_tokens"] == 100
    (row,) = parse_trace(file.getvalue().splitlines())
    assert (row.prompt_tokens, row.output_tokens, len(row.prompt)) == (100, 3, 1)


def test_every_line_is_on_its_way_when_it_is_written() -> None:
    class Counting(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    file = Counting()
    recorder = Recorder(file, 16, b"s")
    finish(recorder, make("a"), 1.0, 3, FinishReason.STOP, 2.0)
    assert file.flushed == file.getvalue() != ""
    assert recorder.lines == 1


def test_a_full_disk_ends_the_recording_only() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    recorder = Recorder(Full(), 16, b"s")
    finish(recorder, make("a"), 1.0, 3, FinishReason.STOP, 2.0)
    finish(recorder, make("b"), 1.0, 3, FinishReason.STOP, 2.0)
    assert recorder.error is not None and "No space" in str(recorder.error)
    assert recorder.lines == 0


def test_memory_is_bounded() -> None:
    file = io.StringIO()
    recorder = Recorder(file, 16, b"s")
    for number in range(MOST_LIVE + 5):
        recorder.note(make(f"r{number}", IDS[:16]))
    finish(recorder, make("r0", IDS[:16]), 1.0, 3, FinishReason.STOP, 2.0)
    finish(recorder, make("r5", IDS[:16]), 1.0, 3, FinishReason.STOP, 2.0)
    oldest, newer = (json.loads(line) for line in file.getvalue().splitlines())
    assert "blocks" not in oldest
    assert len(newer["blocks"]) == 1


class Echo:
    """A service that answers with two tokens, unless it is full."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.full = False
        self.aborted: list[RequestId] = []

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if self.full:
            raise Overloaded("full", 1.0)
        try:
            yield Output(request.id, (1,))
            yield Output(request.id, (2,), finish=FinishReason.STOP)
            finish(self.recorder, request, 1.0, 2, FinishReason.STOP, 2.0)
        except GeneratorExit:
            finish(self.recorder, request, 1.0, 1, FinishReason.ABORT, 1.5)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append(request_id)

    def status(self) -> Status:
        return Status("m", "ready", Capacity(1, 16, 16, 2), 0, 0, 0, 0, 0, 0.0)

    async def drain(self, timeout_s: float) -> bool:
        return timeout_s > 0


def test_a_recorded_service_serves_as_before() -> None:
    file = io.StringIO()
    recorder = Recorder(file, 16, b"s")
    inner = Echo(recorder)
    service = Recorded(inner, recorder)

    async def main() -> None:
        outputs = [output async for output in service.generate(make("a"))]
        assert [output.token_ids for output in outputs] == [(1,), (2,)]
        leaving = service.generate(make("b"))
        await anext(leaving)
        await leaving.aclose()  # type: ignore[attr-defined]
        inner.full = True
        with pytest.raises(Overloaded):
            await anext(service.generate(make("c")))
        service.abort("x")
        assert await service.drain(1.0)
        assert service.status().model == "m"

    clock.run(main(), virtual=True)
    assert inner.aborted == ["x"]
    assert [json.loads(line)["end"] for line in file.getvalue().splitlines()] == ["stop", "abort"]
    assert all("blocks" in json.loads(line) for line in file.getvalue().splitlines())
    assert not recorder._noted
