"""What a recording says is what was recorded, and what is no recording is refused by name of the line."""

from __future__ import annotations

import io

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.core.types import Blank, Request, Sampling, Tokens
from headrace.sim import recording
from headrace.sim.recording import FORMAT, BadRecording, Entry, Head, arrive, read

HEAD = Head(FORMAT, EngineSettings(), Capacity(8, 16, 128, 100), 64)


def lines(*entries: Entry) -> io.BytesIO:
    return io.BytesIO(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))


segments = st.lists(st.builds(Blank, st.integers(1, 99)) | st.builds(Tokens, st.lists(st.integers(0, 99)).map(tuple)))
requests = st.builds(
    Request,
    id=st.text(),
    prompt=segments.map(tuple),
    arrival_s=st.floats(0, 1e6),
    max_new_tokens=st.integers(1, 1000),
    sampling=st.builds(Sampling, prompt_logprobs=st.none() | st.integers(0, 5)),
    stop_token_ids=st.frozensets(st.integers(0, 99)),
    block_keys=st.lists(st.integers(0, 2**128 - 1)).map(tuple),
    salt=st.binary(max_size=20),
    priority=st.integers(-5, 5),
    tenant=st.text(),
    deadline_s=st.none() | st.floats(0, 1e6),
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(requests)
def test_a_request_survives(request: Request) -> None:
    _, entry = read(lines(HEAD, arrive(1.5, request)))
    assert isinstance(entry, recording.Arrive)
    assert entry.request() == request
    assert entry.at_s == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty"),
        (b"{}\n", "line 1 "),
        (b'{"type":"abort","at_s":0,"id":"a"}\n', "begins with one head"),
        (lines(HEAD).getvalue() * 2, "line 2: a recording begins with one head"),
        (lines(HEAD).getvalue() + b'{"type":"abort","at_s":"soon","id":"a"}\n', "line 2 .*at_s"),
        (lines(HEAD).getvalue() + b'{"type":"party"}\n', "line 2 "),
        (lines(HEAD).getvalue() + b"[" * 100_000, "line 2 "),
        (lines(HEAD).getvalue() + b'{"type":"abort","at_s":0,"id":"\xff"}\n', "line 2 "),
        (lines(Head(99, EngineSettings(), Capacity(8, 16, 128, 100), 64)).getvalue(), f"format {FORMAT}"),
    ],
)
def test_anything_else_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(BadRecording, match=message):
        list(read(io.BytesIO(text)))


def test_lines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "LONGEST_LINE", 1000)
    with pytest.raises(BadRecording, match="longer than 1000 bytes"):
        list(read(io.BytesIO(b"x" * 10_000)))
