"""Trace readers: samples of every format, bad lines named, order restored, nothing but BadTrace on any input, and the
published files where they are present."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.types import SLO
from headrace.workload.arrival import Arrival, Stretch, block_keys
from headrace.workload.describe import describe, lru_hit_ratio
from headrace.workload.traces import MOST_LATE, BadTrace, block_name, parse_trace, read_trace

SHARED = Path(__file__).parents[3] / "shared"
GOLDEN = SHARED / "golden" / "workloads.json"
FILES = (
    "AzureLLMInferenceTrace_conv.csv",
    "mooncake_conversation_trace.jsonl",
    "nanoflow_sharegpt_lengths.csv",
    "vidur_arxiv_summarization_lengths.csv",
)
OURS = {"prompt_tokens": 4, "output_tokens": 2}


def alone(at_s: float | None, prompt_tokens: int, output_tokens: int) -> Arrival:
    return Arrival(at_s, (Stretch(prompt_tokens),), output_tokens)


def read(text: str, limit: int | None = None) -> list[Arrival]:
    return list(parse_trace(text.splitlines(keepends=True), limit))


def ours(*rows: dict[str, Any]) -> list[Arrival]:
    return read("\n".join(json.dumps(OURS | row) for row in rows))


def test_azure() -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    text += "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
    first, second = read(text)
    assert first == alone(0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579, abs=2e-6)


def test_burst_gpt_leaves_out_failures() -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n"
    assert read(text) == [alone(0.0, 472, 18), alone(113.0, 417, 276)]


def test_burst_gpt_of_the_third_release_has_more_columns() -> None:
    text = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    assert read(text + "5,abc,1.5,ChatGPT,472,18,490,API log\n") == [alone(0.0, 472, 18)]


def test_lengths_without_times() -> None:
    assert read("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,42,285\nXXX,19,82\n") == [
        alone(None, 42, 285),
        alone(None, 19, 82),
    ]
    text = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.85\n"
    assert read(text) == [alone(None, 3772, 54)]


def test_mooncake_cuts_the_last_block() -> None:
    rows = [
        {"timestamp": 4000, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1]},
        {"timestamp": 2000, "input_length": 1030, "output_length": 8, "hash_ids": [0, 2, 3]},
    ]
    first, second = read("\n".join(map(json.dumps, rows)))
    assert first == Arrival(0.0, (Stretch(512, 0), Stretch(512, 2), Stretch(6, 3)), 8)
    assert second == Arrival(2.0, (Stretch(512, 0), Stretch(488, 1)), 7)


def test_our_own_with_and_without_blocks(tmp_path: Path) -> None:
    rows = [
        {"at_s": 9.5, "prompt_tokens": 20, "output_tokens": 3, "blocks": ["a", 7], "block_tokens": 8},
        {"at_s": 9.0, "prompt_tokens": 5, "output_tokens": 2},
    ]
    path = tmp_path / "trace"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    stretches = (Stretch(8, block_name("a")), Stretch(8, 7), Stretch(4))
    assert list(read_trace(path)) == [alone(0.0, 5, 2), Arrival(0.5, stretches, 3)]


def test_our_own_says_more() -> None:
    more = {"max_new_tokens": 90, "tenant": "t1", "priority": 3, "ttft_s": 0.5}
    (arrival,) = ours({"at_s": 0, **more})
    assert (arrival.max_new_tokens, arrival.tenant, arrival.priority, arrival.slo) == (90, "t1", 3, SLO(ttft_s=0.5))
    assert arrival.output_tokens == 2
    (cancelled,) = ours({"at_s": 0, "cancel_s": 1.5, **more})
    assert (cancelled.cancel_s, cancelled.output_tokens) == (1.5, 90)  # it would have gone on


def test_names_of_blocks() -> None:
    assert block_name(5) == 5
    assert block_name("5") != 5
    assert block_name(2**62 - 1) == 2**62 - 1
    assert len({block_name(name) for name in (-1, 2**62, 2**200, "a", "b", "\ud800")}) == 6
    assert all(0 <= block_name(name) < 2**62 for name in (-1, 2**200, "a"))


def test_the_limit_stops_before_a_bad_row() -> None:
    good = json.dumps({"at_s": 0, "prompt_tokens": 1, "output_tokens": 1})
    text = f"{good}\n{good}\nnonsense\n"
    assert len(read(text, 2)) == 2
    with pytest.raises(BadTrace, match="line 3 is not JSON"):
        read(text)


AZURE, BURST = "TIMESTAMP,ContextTokens,GeneratedTokens\n", "Timestamp,Request tokens,Response tokens\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no requests"),
        (AZURE, "no requests"),
        (BURST + "1,5,0\n", "no requests"),
        ("a,b\n1,2\n", "unknown columns a, b"),
        (AZURE + "yesterday,1,2\n", "line 2"),
        (AZURE + "XXX,1,2\nXXX,1\n", "line 3 has no 'GeneratedTokens'"),
        (AZURE + "XXX,1,2\n2023-11-16 18:15:46,1,3\n", "line 3 has an arrival time"),
        (BURST + "nan,1,2\n", "arrival time"),
        (BURST + "1,-1,2\n", "outside"),
        (BURST + "1,1,99999999999\n", "outside"),
        (BURST + '1,1,"' + "9" * 200_000 + "\n", "line . is not CSV"),
        (BURST + "1,1," + "9" * 9000 + "\n", "line 2"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 1, "blocks": "ab"}', "not a list"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 1, "blocks": [[1]]}', "neither a number nor a string"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 1, "block_tokens": 0}', "line 1"),
        ('{"at_s": 1, "prompt_tokens": 1.5, "output_tokens": 1}', "not a whole number"),
        ('{"at_s": 1, "prompt_tokens": true, "output_tokens": 1}', "not a whole number"),
        ('{"at_s": 1e400, "prompt_tokens": 1, "output_tokens": 1}', "arrival time"),
        ('{"at_s": [], "prompt_tokens": 1, "output_tokens": 1}', "line 1"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 1, "cancel_s": -1}', "seconds"),
        ("{" * 100_000, "not JSON"),
    ],
)
def test_bad_traces_are_named(text: str, complaint: str) -> None:
    with pytest.raises(BadTrace, match=complaint):
        read(text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="cannot read"):
        next(read_trace(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadTrace, match="cannot read"):
        next(read_trace(tmp_path / "binary"))


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("{" + " " * (16 << 20))
    with pytest.raises(BadTrace, match="longer than 16 Mi"):
        next(read_trace(tmp_path / "long"))


def test_order_is_restored_within_the_window() -> None:
    """As a recording is: every request is written some time after it came."""
    rng = Random(7)
    times = [float(at) for at in range(3 * MOST_LATE)]
    rng.shuffle(block := times[:MOST_LATE])
    lines = (json.dumps({"at_s": at_s, **OURS}) for at_s in (*block, *times[MOST_LATE:]))
    assert [arrival.at_s for arrival in parse_trace(lines)] == times


def test_what_comes_too_late_is_named() -> None:
    times = [float(at) for at in range(1, 2 * MOST_LATE)]
    lines = (json.dumps({"at_s": at_s, **OURS}) for at_s in (*times, 0.0))
    with pytest.raises(BadTrace, match=f"line {2 * MOST_LATE} comes more than"):
        list(parse_trace(lines))


def test_reading_is_lazy() -> None:
    """An endless trace can be begun."""

    def endless() -> Iterator[str]:
        at = 0
        while True:
            yield json.dumps({"at_s": at, **OURS})
            at += 1

    assert [arrival.at_s for arrival in islice(parse_trace(endless()), 3)] == [0.0, 1.0, 2.0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    "at_s prompt_tokens output_tokens blocks block_tokens cancel_s max_new_tokens tenant priority ttft_s tpot_s "
    "timestamp input_length output_length hash_ids".split()
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(FIELDS, VALUES), min_size=1, max_size=4), st.sampled_from([{}, OURS]))
def test_any_json_gives_arrivals_or_bad_trace(rows: list[dict[str, Any]], base: dict[str, Any]) -> None:
    check_sane(json.dumps(base | row) for row in rows)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from([AZURE, BURST, "num_prefill_tokens,num_decode_tokens\n", "", "{"]), st.text(max_size=60))
def test_any_text_gives_arrivals_or_bad_trace(header: str, text: str) -> None:
    check_sane((header + text).splitlines(keepends=True))


def check_sane(lines: Any) -> None:
    try:
        made = list(parse_trace(lines))
    except BadTrace:
        return
    times = [arrival.at_s for arrival in made if arrival.at_s is not None]
    assert times == sorted(times)
    assert not times or (times[0] == 0.0 and len(times) == len(made))
    assert all(arrival.prompt_tokens >= 1 and arrival.output_tokens >= 1 for arrival in made)
    assert all(stretch.tokens >= 1 for arrival in made for stretch in arrival.prompt)


needs_traces = pytest.mark.skipif(not GOLDEN.exists(), reason="the published traces are not here")


@needs_traces
@pytest.mark.parametrize("name", FILES)
def test_the_published_statistics_come_out_exactly(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())["trace_stats"][name]
    got = describe(read_trace(SHARED / "traces" / name))
    assert got.requests == golden["rows"]
    for lengths, expected in ((got.prompt, golden["input"]), (got.output, golden["output"])):
        assert round(lengths.mean, 2) == expected["mean"]
        assert round(lengths.std, 2) == expected["std"]
        for level in ("p10", "p50", "p90", "p99"):
            assert getattr(lengths, level) == pytest.approx(expected[level], rel=1e-12)
        assert (lengths.min, lengths.max) == (expected["min"], expected["max"])
    assert golden.get("sum_in", got.prompt.sum) == got.prompt.sum
    assert golden.get("sum_out", got.output.sum) == got.output.sum
    if "span_s" in golden:
        assert got.span_s is not None and got.rate is not None and got.gap_cv is not None
        assert round(got.span_s, 3) == golden["span_s"]
        assert round(got.rate, 4) == golden["mean_rate_rps"]
        assert round(got.gap_cv, 3) == golden["interarrival_cv"]


@needs_traces
def test_mooncakes_blocks_and_the_hit_ratios_of_its_caches() -> None:
    golden = json.loads(GOLDEN.read_text())
    made = list(read_trace(SHARED / "traces" / FILES[1]))
    names = [[stretch.name for stretch in arrival.prompt] for arrival in made]
    stats = golden["trace_stats"][FILES[1]]
    assert sum(map(len, names)) == stats["blocks_total"]
    assert len({name for row in names for name in row}) == stats["unique_blocks"]
    assert all(len(arrival.prompt) == -(-arrival.prompt_tokens // 512) for arrival in made)
    for capacity, ratio in golden["mooncake_lru_prefix_hit_ratio"]["values"]["conversation"].items():
        assert round(lru_hit_ratio(names, int(capacity)), 4) == ratio
    assert round(lru_hit_ratio(names, 10**9), 4) == stats["infinite_cache_prefix_block_hit_ratio"]


@needs_traces
def test_mooncake_in_small_blocks_shares_what_it_shared_in_large_ones() -> None:
    """512-token names become chains of 16-token keys: of full blocks, the same share is found."""
    made = list(islice(read_trace(SHARED / "traces" / FILES[1]), 1500))
    large = [block_keys(arrival.prompt, 512, b"") for arrival in made]
    small = [block_keys(arrival.prompt, 16, b"") for arrival in made]
    assert all(len(keys) == arrival.prompt_tokens // 16 for keys, arrival in zip(small, made, strict=True))
    found_large = lru_hit_ratio(large, 10**9) * sum(map(len, large)) * 512
    found_small = lru_hit_ratio(small, 10**9) * sum(map(len, small)) * 16
    assert found_large <= found_small <= found_large + 512 * len(made)
