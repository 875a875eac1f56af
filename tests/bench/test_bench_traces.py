"""Trace readers: small samples of every format, bad rows named by line, the published files where they are present."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.bench.traces import BadTrace, Row, read_trace

SHARED = Path(__file__).parents[3] / "shared" / "traces"


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text, encoding="utf-8")
    return path


def test_azure(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    text += "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
    first, second = read_trace(written(tmp_path, text))
    assert first == Row(0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579, abs=2e-6)


def test_burst_gpt(tmp_path: Path) -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n"
    assert read_trace(written(tmp_path, text)) == [Row(0.0, 472, 18), Row(40.0, 1087, 1)]


def test_own_format_with_and_without_blocks(tmp_path: Path) -> None:
    rows = [
        {"at_s": 9.5, "prompt_tokens": 20, "output_tokens": 3, "blocks": ["a", 7], "block_tokens": 16},
        {"at_s": 9.0, "prompt_tokens": 5, "output_tokens": 2},
    ]
    text = "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n"
    assert read_trace(written(tmp_path, text)) == [Row(0.0, 5, 2), Row(0.5, 20, 3, ("a", "7"), 16)]


def test_the_limit_stops_before_a_bad_row(tmp_path: Path) -> None:
    good = json.dumps({"at_s": 0, "prompt_tokens": 1, "output_tokens": 1})
    path = written(tmp_path, f"{good}\n{good}\nnonsense\n")
    assert len(read_trace(path, 2)) == 2
    with pytest.raises(BadTrace, match="line 3 is not JSON"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("a,b\n1,2\n", "unknown columns a, b"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,1,2\nXXX,1\n", "line 3"),
        ("Timestamp,Request tokens,Response tokens\nnan,1,2\n", "arrival time"),
        ("Timestamp,Request tokens,Response tokens\n1,-1,2\n", "outside"),
        ("Timestamp,Request tokens,Response tokens\n1,1,99999999999\n", "outside"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 1, "blocks": "ab"}', "not a list"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 1, "block_tokens": 0}', "line 1"),
        ('{"at_s": 1e400, "prompt_tokens": 1, "output_tokens": 1}', "arrival time"),
        ('{"at_s": [], "prompt_tokens": 1, "output_tokens": 1}', "line 1"),
        ("{" * 100_000, "not JSON"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BadTrace, match=complaint):
        read_trace(written(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="cannot read"):
        read_trace(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadTrace, match="cannot read"):
        read_trace(tmp_path / "binary")


@pytest.mark.skipif(not SHARED.exists(), reason="the published traces are not here")
def test_the_published_files() -> None:
    azure = read_trace(SHARED / "AzureLLMInferenceTrace_conv.csv")
    assert len(azure) == 19_366
    assert azure[-1].at_s == pytest.approx(3501.7, abs=1.0)
    assert sum(row.prompt_tokens for row in azure) / len(azure) == pytest.approx(1154.7, abs=1.0)
    mooncake = read_trace(SHARED / "mooncake_conversation_trace.jsonl")
    assert len(mooncake) == 12_031
    assert all(len(row.blocks) == -(-row.prompt_tokens // 512) for row in mooncake)
