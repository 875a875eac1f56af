"""`headrace top`: what a frame says, what keys do, and what is said when there is nothing to watch."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli import main
from headrace.cli.top import frame
from headrace.cli.top.frame import Size
from headrace.cli.top.screen import View
from headrace.cli.top.source import Away, Memory, Request, Snapshot, Source, Step, Steps

KEY, OTHERS_KEY = "hr-secret", "hr-no-admin"
ROW = {
    "id": "chatcmpl-0123456789abcdef",
    "state": "decoding",
    "tenant": "alice",
    "total_ms": 1234.0,
    "queue_ms": 56.0,
    "ttft_ms": 210.0,
    "prompt_tokens": 2048,
    "output_tokens": 17,
    "finish": None,
    "from_a_newer_server": 1,
}
ROWS = [ROW, ROW | {"id": "chatcmpl-done", "state": "finished", "finish": "stop", "tenant": None, "ttft_ms": None}]
STEP = {"repetitions": 1, "ended": 999.5, "ms": 40.0, "requests": 3, "tokens": 66, "prompts": 1}
STEPS = {
    "now": 1000.0,
    "memory": [{"model": "m", "block_tokens": 16, "total_blocks": 100, "used_blocks": 25, "cached_blocks": 50}],
    "data": [STEP, STEP | {"repetitions": 10, "ended": 999.9, "ms": 100.0, "requests": 2, "tokens": 2, "prompts": 0}],
}
WORDS = [
    "It waited 1.84 s in the queue: a prompt of 6,000 tokens of another tenant was computed.",
    "It drew 17 tokens.",
]


class Pages(BaseHTTPRequestHandler):
    """The three pages, by rote."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answers = {"/v1/steps": STEPS, "/v1/requests?limit=100": {"data": ROWS}}
        answers["/v1/requests/chatcmpl-done/explain"] = {"words": WORDS}
        bearer = self.headers.get("Authorization")
        if bearer == f"Bearer {OTHERS_KEY}" and self.path == "/v1/steps":
            self.server.refused += 1  # type: ignore[attr-defined]
            self.answer(403, {"error": {"message": "Not for you."}})
        elif bearer not in (f"Bearer {KEY}", f"Bearer {OTHERS_KEY}"):
            self.answer(401, {"error": {"message": "Send a key."}})
        elif self.path in answers:
            self.answer(200, answers[self.path])
        else:
            self.answer(404, {"error": {"message": f"nothing at {self.path}"}})

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.refused = 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def shown(lines: list[frame.Line]) -> str:
    return "\n".join(line.text(False) for line in lines)


def test_one_frame_for_scripts(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # no terminal, and nobody says how wide one would be
    assert main(["top", "--url", f"{url}/v1", "--api-key", KEY, "--once"]) == 0
    told = capsys.readouterr().out
    assert "running 1   waiting 0   output 4 tokens/s   prompt 13 tokens/s" in told  # (2 + 10 * 2) / 5 and 64 / 5
    assert "25% used, 50% cached of 1,600 tokens" in told
    assert "last 10 ms, longest 40 ms" in told
    row = next(line for line in told.splitlines() if "alice" in line)
    assert row.split() == "chatcmpl-0123456789abcdef alice writes 1.23 s 56 ms 210 ms 2,048 17".split()
    assert "\x1b" not in told


def test_a_users_key_sees_its_own_and_asks_only_once_for_the_rest(server: ThreadingHTTPServer, url: str) -> None:
    view = View(Source(url, OTHERS_KEY))
    view.refresh()
    view.refresh()
    told = shown(view.lines(Size(120, 40)))
    assert "running 1   waiting 0\n" in told and "requests of your tenant" in told and "tokens/s" not in told
    assert server.refused == 1 and view.away is None  # type: ignore[attr-defined]


def test_a_long_wait_has_its_reason_beside_it_where_there_is_room() -> None:
    rows = [
        msgspec.convert(ROW | {"queue_ms": ms, "waits_for": "prompts of other tenants"}, Request) for ms in (9, 900)
    ]
    now = Snapshot("http://x", None, rows)
    wide, narrow = (shown(frame.overview(now, Size(columns, 30), None)).splitlines() for columns in (160, 80))
    assert [line.endswith("prompts of other tenants") for line in wide[-2:]] == [False, True]
    assert not any("prompts of" in line for line in narrow)


def test_a_server_that_is_away_or_refuses_or_is_another_is_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", url, "--once"]) == 2
    assert f"{url} says 401: Send a key." in capsys.readouterr().err
    assert main(["top", "--url", f"{url}/elsewhere", "--api-key", KEY, "--once"]) == 2
    assert "nothing at /elsewhere/v1/steps" in capsys.readouterr().err
    assert main(["top", "--url", "http://127.0.0.1:1", "--once"]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert main(["top", "--url", "localhost", "--once"]) == 2
    assert "is not a base URL" in capsys.readouterr().err


def test_arrows_choose_and_enter_explains(url: str) -> None:
    view = View(Source(url, KEY))
    view.refresh()
    for key in ("up", "down", "down"):
        assert view.press(key)
    assert view.chosen == "chatcmpl-done"
    assert view.press("enter")
    assert WORDS[1] in shown(view.lines(Size(200, 40)))
    assert view.press("back")
    assert "REQUEST" in shown(view.lines(Size(200, 40)))
    assert not view.press("quit")


def test_a_server_that_goes_away_leaves_its_last_frame() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = 1

        def now(self) -> Snapshot:
            self.left -= 1
            if self.left < 0:
                raise Away("http://x does not answer")
            return Snapshot("http://x", Steps(0.0, [], []), [])

    view = View(Once())  # type: ignore[arg-type]
    view.refresh()
    view.refresh()
    told = shown(view.lines(Size(80, 24)))
    assert "Headrace  http://x" in told and "does not answer" in told


@pytest.mark.parametrize(
    ("ms", "told"),
    [
        *[(None, "-"), (0, "0 ms"), (0.42, "0.4 ms"), (12.3, "12 ms"), (1234, "1.23 s"), (45_678, "45.7 s")],
        *[(83_000, "1m23s"), (119_999, "2m00s"), (3_600_000, "1h00m")],
    ],
)
def test_durations(ms: float | None, told: str) -> None:
    assert frame.duration(ms) == told


def test_a_run_of_steps_counts_as_far_as_it_is_recent() -> None:
    run = Step(repetitions=100, ended=10.0, ms=10_000.0, requests=2, tokens=2, prompts=0)
    assert frame.rate([run], 10.0, lambda step: step.tokens) == pytest.approx(20)  # 100 tokens in 5 s
    assert frame.rate([run], 16.0, lambda step: step.tokens) == 0


texts = st.text(max_size=40)
amounts = st.integers(0, 10**7)
states = st.sampled_from(["waiting", "prefilling", "decoding", "finished", "unheard of"])
requests = st.lists(
    st.builds(Request, texts, states, st.floats(0, 1e9), st.floats(0, 1e9), amounts, amounts, st.none() | texts),
    max_size=30,
)
blocks = st.builds(
    lambda total, used, cached: Memory("m", 16, total, min(used, total), min(cached, total - min(used, total))),
    *[st.integers(0, 10**6)] * 3,
)
steps = st.lists(
    st.builds(Step, st.integers(1, 10**4), st.floats(0, 2e9), st.floats(0, 1e6), amounts, amounts, amounts),
    max_size=200,
)


@settings(max_examples=40)
@given(requests, st.lists(blocks, max_size=3), steps, st.integers(30, 250), st.integers(8, 60))
def test_no_server_can_break_or_steer_the_terminal(
    rows: list[Request], memory: list[Memory], beats: list[Step], columns: int, lines: int
) -> None:
    chosen = rows[-1].id if rows else None
    frames = frame.overview(Snapshot("http://x", Steps(1e9, memory, beats), rows), Size(columns, lines), chosen)
    assert len(frames) <= max(lines, 6 + len(memory) + 2)
    for line in frames:
        assert line.text(False).isprintable()
        assert re.sub(r"\x1b\[\d*m", "", line.text(True)).isprintable()
    if rows:
        assert any(how == "chosen" for line in frames for _, how in line.pieces)


@given(st.lists(texts, max_size=5), st.integers(20, 100))
def test_explanations_are_wrapped_and_harmless(sentences: list[str], columns: int) -> None:
    for line in frame.explanation("id\x1b[2J", sentences, Size(columns, 50)):
        assert line.text(False).isprintable()
        assert len(line.text(False)) <= max(24, columns)
