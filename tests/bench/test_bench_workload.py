"""Arrival and length laws, prompts and bodies: means, variances, determinism, exact lengths."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.settings import BenchSettings
from headrace.bench.workload import (
    arrivals,
    body,
    jobs,
    parse_lengths,
    prompt_ids,
    prompt_text,
    warmup_jobs,
    with_bodies,
)
from headrace.core.config import BadSetting


def test_arrivals_start_at_zero_never_go_back_and_depend_on_the_seed_only() -> None:
    times = list(islice(arrivals(5.0, 0.5, Random(3)), 1000))
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times == list(islice(arrivals(5.0, 0.5, Random(3)), 1000))
    assert times != list(islice(arrivals(5.0, 0.5, Random(4)), 1000))
    assert set(islice(arrivals(math.inf, 1.0, Random(5)), 10)) == {0.0}


def test_length_laws() -> None:
    rng = Random(6)
    assert {parse_lengths("128", "input")(rng) for _ in range(10)} == {128}
    uniform = [parse_lengths("10:20", "input")(rng) for _ in range(20_000)]
    assert (min(uniform), max(uniform)) == (10, 20)
    assert fmean(uniform) == pytest.approx(15, abs=0.1)
    drawn = sorted(parse_lengths("ln:200:0.5", "output")(rng) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(200, rel=0.03)
    assert fmean(drawn) == pytest.approx(200 * math.exp(0.5**2 / 2), rel=0.03)


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "5:4", "a", "1:2:3", "ln:5", "ln:0:1", "ln:5:-1", "ln:nan:1", "99999999"]
)
def test_bad_lengths(text: str) -> None:
    with pytest.raises(BadSetting, match="--input"):
        parse_lengths(text, "input")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.integers(0, 2**40),
    st.lists(st.tuples(st.sampled_from(["group/0", "group/1", "request/0"]), st.integers(1, 50)), max_size=4),
)
def test_prompts_have_exact_lengths_and_depend_on_seed_and_keys(seed: int, parts: list[tuple[str, int]]) -> None:
    stretches = tuple(parts)
    ids = prompt_ids(stretches, range(10, 20), seed)
    assert len(ids) == sum(tokens for _, tokens in stretches)
    assert set(ids) <= set(range(10, 20))
    assert ids == prompt_ids(stretches, range(10, 20), seed)
    assert len(prompt_text(stretches, seed).split()) == len(ids)


def test_groups_share_prefixes_and_nothing_else() -> None:
    made = jobs(BenchSettings(requests=6, input="40", shared_prefix=30, groups=2))
    ids = [prompt_ids(job.stretches, range(1000, 30_001), 0) for job in made]
    assert ids[0][:30] == ids[2][:30] == ids[4][:30] != ids[1][:30]
    assert ids[1][:30] == ids[3][:30]
    assert len({tuple(one[30:]) for one in ids}) == 6
    short = jobs(BenchSettings(requests=1, input="5", shared_prefix=30))[0]
    assert short.stretches == (("group/0", 5),)


def test_the_seed_changes_everything_and_only_the_seed_does() -> None:
    base = BenchSettings(requests=20, rate=3.0, input="10:90", output="ln:30:1")
    again = BenchSettings(requests=20, rate=3.0, input="10:90", output="ln:30:1")
    other = BenchSettings(requests=20, rate=3.0, input="10:90", output="ln:30:1", seed=1)
    assert jobs(base) == jobs(again) != jobs(other)
    assert body(base, "m", jobs(base)[0]) == body(again, "m", jobs(again)[0]) != body(other, "m", jobs(base)[0])


def test_warm_up_uses_other_contents_of_the_same_lengths() -> None:
    settings = BenchSettings(requests=3, input="10:90", warmup=2)
    measured = jobs(settings)
    warm = warmup_jobs(settings, measured)
    assert [job.prompt_tokens for job in warm] == [job.prompt_tokens for job in measured[:2]]
    assert prompt_ids(warm[0].stretches, range(50_000), 0) != prompt_ids(measured[0].stretches, range(50_000), 0)


def test_bodies() -> None:
    settings = BenchSettings(requests=1, input="4", output="9", extra='{"top_p": 0.5, "ignore_eos": null, "n": 1}')
    sent = json.loads(body(settings, "m", jobs(settings)[0]))
    assert len(sent.pop("prompt")) == 4
    assert sent == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 9, "temperature": 0.0,
        "top_p": 0.5, "n": 1,
    }  # fmt: skip
    chat = BenchSettings(requests=1, input="4", endpoint="chat")
    message = json.loads(body(chat, "m", jobs(chat)[0]))["messages"][0]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 4
    text = BenchSettings(requests=1, input="4", prompt="text")
    assert len(json.loads(body(text, "m", jobs(text)[0]))["prompt"].split()) == 4


def test_bodies_come_with_their_jobs_in_order() -> None:
    settings = BenchSettings(requests=30, input="3")
    pairs = list(with_bodies(settings, "m", jobs(settings)))
    assert [job.index for job, _ in pairs] == list(range(30))
    assert all(request == body(settings, "m", job) for job, request in pairs)


def test_a_trace_gives_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 4000, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1]},
        {"timestamp": 2000, "input_length": 1030, "output_length": 8, "hash_ids": [0, 2, 3]},
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    made = jobs(BenchSettings(trace=trace, trace_speed=4.0))
    assert [job.at_s for job in made] == [0.0, 0.5]
    assert made[1].stretches == (("block/0", 512), ("block/1", 488))
    first, second = (prompt_ids(job.stretches, range(9999), 0) for job in made)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:]
    assert len(jobs(BenchSettings(trace=trace, limit=1))) == 1
    assert [job.at_s for job in jobs(BenchSettings(trace=trace, rate=math.inf))] == [0.0, 0.0]


def test_lengths_without_times_need_a_rate(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,5,6\nXXX,7,8\n")
    with pytest.raises(BadSetting, match="--rate"):
        jobs(BenchSettings(trace=trace))
    assert [job.prompt_tokens for job in jobs(BenchSettings(trace=trace, rate=1.0))] == [5, 7]
