"""Reports: JSON there and back, tables, comparison, and a page that is well formed and needs nothing from outside."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.client import Failure
from headrace.bench.metrics import Record
from headrace.bench.page import page
from headrace.bench.report import BadReport, Report, compare, from_json, read_json, save, table
from headrace.bench.settings import BenchSettings
from headrace.draw.text import short

EVIL = "<script>alert(1)</script>&amp;\"'"


def made_record(index: int, due_us: int, gaps_us: list[int], failure: Failure | None = None) -> Record:
    """A record on whole microseconds, as measured ones are."""
    times, at_us = [], due_us
    for gap in gaps_us:
        at_us += gap
        times.append(at_us / 1e6)
    return Record(
        index=index,
        due_s=due_us / 1e6,
        sent_s=due_us / 1e6,
        ended_s=times[-1] if times else (due_us + 5) / 1e6,
        lag_s=0.0,
        prompt_tokens=7,
        output_tokens=len(times),
        asked_tokens=4,
        cached_tokens=None if index % 2 else 3,
        token_times_s=tuple(times),
        finish="stop" if times else None,
        failure=failure or (None if times else Failure("timeout", EVIL)),
    )


def made_report(records: list[Record], **options: object) -> Report:
    wanted = BenchSettings(**({"slo": "ttft=0.2,itl=0.05"} | options))  # type: ignore[arg-type]
    return Report(
        "2026-01-01T00:00:00+00:00", f"tiny {EVIL}", "fake/1", wanted.public(), {"headrace": "0"}, 0.5, tuple(records)
    )


def typical(scale: int = 1, **options: object) -> Report:
    records = [made_record(i, 100_000 * i, [scale * (150_000 + 9000 * i), *[scale * 20_000] * 5]) for i in range(20)]
    return made_report([*records, made_record(20, 5000, [])], **options)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**10), st.lists(st.integers(0, 10**8), max_size=20)), max_size=6))
def test_json_there_and_back(shapes: list[tuple[int, list[int]]]) -> None:
    report = made_report([made_record(i, due_us, gaps) for i, (due_us, gaps) in enumerate(shapes)])
    text = json.dumps(report.to_json(), allow_nan=False)
    again = from_json(json.loads(text))
    assert again == report
    assert again.summary() == report.summary()


def test_the_json_has_the_keys_other_tools_read(tmp_path: Path) -> None:
    save(typical(), tmp_path / "a.json")
    value = read_json(tmp_path / "a.json")
    assert (value["completed"], value["failed"], value["total_output_tokens"]) == (20, 1, 120)
    assert value["mean_ttft_ms"] == pytest.approx(150 + 9 * 9.5)
    assert [value["mean_itl_ms"], value["median_tpot_ms"]] == pytest.approx([20, 20])
    assert value["ttfts"][0] == 0.15
    assert value["itls"][0] == [0.02] * 5
    assert value["settings"]["slo"] == "ttft=0.2,itl=0.05"
    assert value["goodput_fraction"] == pytest.approx(6 / 21)
    assert "api_key" not in value["settings"]


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 9}, {"ttfts": [1.0]}, {"due_times": ["x"] * 21}, {"itls": 4}, {"settings": None}, {"settings": {}},
        {"output_lens": [None] * 21}, {"input_lens": [1.5] * 21}, {"finish_reasons": [4] * 21}, {"itls": [["a"]] * 21},
    ],
)  # fmt: skip
def test_damaged_files_are_refused(damage: dict[str, object]) -> None:
    with pytest.raises(BadReport, match=r"damaged|schema"):
        from_json(typical().to_json() | damage)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("list", "text", "deep", "absent"):
        with pytest.raises(BadReport, match=name):
            read_json(tmp_path / f"{name}.json")
    with pytest.raises(BadReport, match="cannot write"):
        save(typical(), tmp_path / "absent" / "x.json")


def test_the_table_of_a_run() -> None:
    text = table(typical(rate=4.0, burstiness=0.5))
    assert "open loop, 4/s, Gamma of shape 0.5, 21 requests, seed 0" in text
    assert "20 answered, 1 failed" in text
    assert "TTFT <= 200 ms, ITL <= 50 ms" in text
    assert re.search(r"longest ITL +20\.0 +20\.0 +20\.0 +20\.0 +20\.0\n", text)
    assert "1 x timeout" in text
    assert "client lag" in text
    assert "client lag" not in table(typical(concurrency=4))


def test_notes_warn_about_short_answers_and_a_slow_generator() -> None:
    records = [replace(record, lag_s=0.2, asked_tokens=99) for record in typical().records]
    text = table(replace(made_report(records, rate=1.0), client_cpu_s=1e6))
    assert "20 answers had fewer tokens" in text
    assert "fell behind by up to 200 ms" in text
    assert "whole core" in text


def test_a_run_without_answers_has_a_table_and_a_page() -> None:
    report = made_report([made_record(0, 0, [])])
    assert "0 answered, 1 failed" in table(report)
    assert "no values" in page([("x", report)])


def test_comparison_by_hand() -> None:
    text = compare([("one", typical().to_json()), ("two", typical(2).to_json()), ("vllm", {"mean_ttft_ms": 58.875})])
    lines = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert lines["TTFT mean ms"] == ["235.5", "471", "(2.00x)", "58.88", "(0.25x)"]
    assert lines["requests failed"] == ["1", "1", "(1.00x)", "-"]
    assert text.splitlines()[0].split() == ["one", "two", "vllm"]


def test_comparison_ignores_what_is_not_a_number() -> None:
    text = compare([("a", {"duration": "long"}), ("b", {"duration": True, "completed": 0}), ("c", {"completed": 5})])
    assert "duration" not in text
    assert "completed" in text


class Outline(HTMLParser):
    """Checks nesting and collects what could load something."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[str] = []
        self.loads: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [
            pair for pair in attrs if pair[0] in ("src", "href", "srcset", "style") or pair[0].startswith("on")
        ]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.mark.parametrize("runs", [1, 2, 8])
def test_the_page_is_well_formed_and_self_contained(runs: int) -> None:
    text = page([(f"run {i} {EVIL}", typical(i + 1)) for i in range(runs)])
    outline = Outline()
    outline.feed(text)
    outline.close()
    assert outline.stack == []
    assert outline.loads == []
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.seen)
    assert "url(" not in text
    assert "@import" not in text
    assert outline.seen.count("svg") == 5 + min(runs, 6)
    links = set(re.findall(r"https?://[^\s<,]+", text))
    assert links == {"http://127.0.0.1:8000/v1"}  # the address that was measured, as text
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.S).lower().replace("tenant", "")


def test_the_page_draws_promises_failures_and_misses() -> None:
    text = page([("x", typical())])
    assert "SLO 200 ms" in text
    assert 'class="failed"' in text
    assert 'class="late"' in text


def test_long_runs_are_sampled_and_say_so() -> None:
    records = [made_record(i, 1000 * i, [1000, 1000]) for i in range(1000)]
    text = page([("x", made_report(records))])
    assert "every 5th request" in text
    assert text.count("<g>") == 200


def test_short_numbers() -> None:
    assert [short(x) for x in (0.012345, 1.2345, 123.45, 12345.6, 7.0)] == ["0.01235", "1.234", "123.5", "12,346", "7"]
