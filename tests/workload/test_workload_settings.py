"""Traffic out of words: every knob does what it says, and the same words give the same traffic in any process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.core.config import BadSetting, load
from headrace.core.types import SLO
from headrace.workload.arrival import Arrival
from headrace.workload.describe import describe
from headrace.workload.settings import WorkloadSettings, mixture, parts, workload

ROWS = [
    {"at_s": at, "prompt_tokens": 20 + at, "output_tokens": 5 + at, "blocks": [7, at], "block_tokens": 8}
    for at in range(10)
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def made(**words: Any) -> list[Arrival]:
    return list(workload(WorkloadSettings(**words)))


def times(arrivals: list[Arrival]) -> list[float | None]:
    return [arrival.at_s for arrival in arrivals]


def test_five_thousand_chats_come_by_default() -> None:
    got = describe(made())
    assert got.requests == 5000
    assert got.rate == pytest.approx(1.0, rel=0.1)
    assert got.prompt.mean == pytest.approx(257, rel=0.25)
    assert got.shared_fraction == 0.0


def test_rate_time_and_count() -> None:
    got = made(arrivals="poisson:6", lengths="128,64", seconds=500.0)
    assert len(got) == pytest.approx(3000, rel=0.06)
    assert max(arrival.at_s or 0 for arrival in got) < 500
    later = made(arrivals="even:2", lengths="128,64", skip=10.0, seconds=5.0)
    assert times(later) == [at / 2 for at in range(10)]
    assert len(made(arrivals="even:2", seconds=5.0, requests=3)) == 3
    assert times(made(arrivals="even:1", requests=3, speed=4.0)) == [0.0, 0.25, 0.5]


def test_the_rate_does_not_change_who_comes() -> None:
    slow, fast = (made(arrivals=f"poisson:{rate}", requests=50) for rate in (1, 10))
    assert [arrival.prompt for arrival in slow] == [arrival.prompt for arrival in fast]


def test_conversations_prefixes_tenants_and_promises() -> None:
    got = made(
        turns="3", gap="exp:2", shared_prefix=64, groups="4:1.1", lengths="100,20", tenants="5", tenant="t",
        priority=1, slo="ttft=0.5,tpot=0.05", max_new_tokens=10, requests=3000,
    )  # fmt: skip
    summary = describe(got)
    assert summary.follow_ups == pytest.approx(2000, rel=0.05)
    assert summary.tenants == 5
    assert summary.output.max == 10
    assert 0.5 < summary.shared_fraction < 0.8
    assert {(arrival.priority, arrival.slo) for arrival in got} == {(1, SLO(0.5, 0.05))}
    assert {arrival.tenant for arrival in got} == {f"t{number}" for number in range(5)}


def test_a_trace_is_replayed(trace: Path) -> None:
    got = made(trace=trace)
    assert times(got) == [float(at) for at in range(10)]
    assert [arrival.prompt_tokens for arrival in got] == list(range(20, 30))
    assert got[3].prompt[0].name == 7
    assert times(made(trace=trace, speed=2.0, skip=1.0, seconds=2.0)) == [0.0, 0.5, 1.0, 1.5]
    scaled = made(trace=trace, prompt_scale=2.0, output_scale=0.5)
    assert [arrival.prompt_tokens for arrival in scaled] == list(range(40, 60, 2))
    named = made(trace=trace, tenant="x", priority=4, slo="tpot=1", max_new_tokens=6, requests=3)
    assert [arrival.output_tokens for arrival in named] == [5, 6, 6]
    assert {(one.tenant, one.priority, one.slo) for one in named} == {("x", 4, SLO(tpot_s=1.0))}


def test_a_trace_at_other_times(trace: Path) -> None:
    got = made(trace=trace, arrivals="even:10")
    assert times(got) == pytest.approx([at / 10 for at in range(10)])
    assert [arrival.prompt for arrival in got] == [arrival.prompt for arrival in made(trace=trace)]
    closed = made(trace=trace, arrivals="closed:2:0.5")
    assert [(arrival.at_s, arrival.gap_s) for arrival in closed] == [(None, 0.5)] * 10


def test_lengths_drawn_from_a_trace(trace: Path) -> None:
    got = made(trace=trace, lengths="pairs", arrivals="poisson:1", requests=400)
    assert len(got) == 400
    assert {(one.prompt_tokens, one.output_tokens) for one in got} == {(20 + at, 5 + at) for at in range(10)}


def test_closed_loops() -> None:
    settings = WorkloadSettings(arrivals="closed:8:exp:2", requests=5)
    assert settings.clients == 8
    assert times(list(workload(settings))) == [None] * 5
    assert WorkloadSettings().clients is None


def test_the_files_own_mixture(trace: Path) -> None:
    toml = {
        "workload": {
            "requests": 40,
            "chat": {"arrivals": "poisson:5", "lengths": "sharegpt"},
            "agents": {"arrivals": "poisson:1", "turns": "2:9", "gap": "0.1@80+30@20", "priority": -1},
            "batch": {"trace": str(trace), "tenant": "nightly"},
        }
    }
    settings = [load(WorkloadSettings, None, part) for part in parts(toml)]
    got = list(mixture(settings))
    assert [(part.tenant, part.requests) for part in settings] == [("chat", 40), ("agents", 40), ("nightly", 40)]
    assert times(got) == sorted(arrival.at_s or 0.0 for arrival in got)
    assert len(got) == 90
    assert {arrival.tenant for arrival in got} == {"chat", "agents", "nightly"}
    assert parts({}) == ({"workload": {}},)
    assert list(mixture([WorkloadSettings(requests=5)])) == made(requests=5)
    with pytest.raises(BadSetting, match="cannot be mixed"):
        mixture([WorkloadSettings(), WorkloadSettings(arrivals="closed:2")])
    with pytest.raises(BadSetting, match="not a table"):
        parts({"workload": 3})


@pytest.mark.parametrize(
    "words",
    [
        {"arrivals": "often"},
        {"lengths": "long"},
        {"turns": "0"},
        {"gap": "-1"},
        {"groups": "0"},
        {"groups": "3:x"},
        {"tenants": "x"},
        {"slo": "ttft"},
        {"slo": "e2e=3"},
        {"slo": "ttft=nan"},
        {"shared_prefix": -1},
        {"requests": 0},
        {"seconds": float("nan")},
        {"speed": 0.0},
        {"prompt_scale": float("inf")},
        {"arrivals": "closed:2", "turns": "3"},
    ],
)
def test_bad_words_are_refused_at_once(words: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        WorkloadSettings(**words)


def test_combinations_that_mean_nothing(trace: Path, tmp_path: Path) -> None:
    untimed = tmp_path / "lengths.csv"
    untimed.write_text("num_prefill_tokens,num_decode_tokens\n5,6\n7,8\n")
    with pytest.raises(BadSetting, match="no arrival times; give --arrivals"):
        made(trace=untimed)
    assert len(made(trace=untimed, arrivals="even:1")) == 2
    with pytest.raises(BadSetting, match="give --trace"):
        made(lengths="pairs")
    with pytest.raises(BadSetting, match="needs --arrivals"):
        made(lengths="pairs", trace=trace)
    for cut in ({"speed": 2.0}, {"skip": 1.0}, {"seconds": 3.0}):
        with pytest.raises(BadSetting, match="closed loop"):
            made(arrivals="closed:2", **cut)


_PRINT = """
import hashlib
from headrace.workload.settings import WorkloadSettings, workload
words = dict(arrivals="mmpp:2@5,20@1", turns="1:4", shared_prefix=32, groups="9:1.2", tenants="4", requests=300, seed=5)
print(hashlib.sha256(repr(list(workload(WorkloadSettings(**words)))).encode()).hexdigest())
"""


def test_the_same_words_give_the_same_traffic_in_any_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _PRINT],
            env=dict(os.environ, PYTHONHASHSEED=seed),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(digests) == 1
    assert made(requests=20, seed=1) == made(requests=20, seed=1) != made(requests=20, seed=2)
