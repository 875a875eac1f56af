"""The soak's judgement on made-up samples, and its short form against a server that is started as a user starts it."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import soak
from reliability.check import Found, Setting
from reliability.running import tiny_model

MIB = 2**20


def run(mib_per_hour: float = 0.0, noise_mib: float = 0.3, threads_per_hour: float = 0.0) -> list[soak.Sample]:
    """20 minutes of samples of a server that begins with 300 MiB; the noise of neighbours is alike."""
    rng, noise, samples = random.Random(7), 0.0, []
    for at_s in range(2, 1201, 2):
        noise = 0.8 * noise + rng.gauss(0, noise_mib)
        resident = 300 + mib_per_hour * at_s / 3600 + noise
        threads = 6 + int(threads_per_hour * at_s / 3600)
        samples.append(soak.Sample(at_s, int(resident * MIB), 30 + at_s % 5, threads, at_s * 1.5))
    return samples


def judged(samples: list[soak.Sample], tally: soak.Tally | None = None, blocks: int = 0) -> Found:
    return soak.judged(samples, tally or soak.Tally(right=1000), blocks, long=True)


def test_the_interval_holds_the_true_slope() -> None:
    inside = 0
    for seed in range(200):
        rng, noise, ys = random.Random(seed), 0.0, list[float]()
        for at in range(300):
            noise = 0.7 * noise + rng.gauss(0, 1)
            ys.append(5 + 0.02 * at + noise)
        slope, about = soak.line(range(300), ys)
        inside += abs(slope - 0.02) <= about
    assert 180 <= inside <= 199, "95 % of them should"


def test_a_straight_line_is_known_exactly() -> None:
    assert soak.line([0, 1, 2, 3], [1, 3, 5, 7]) == pytest.approx((2, 0))


def test_what_keeps_its_promise_holds_and_every_leak_is_seen() -> None:
    assert judged(run()).held and judged(run(-20)).held
    assert not judged(run(30)).held, "30 MiB an hour"
    assert not judged(run(threads_per_hour=60)).held
    assert not judged(run(), blocks=1).held
    assert not judged(run(), soak.Tally(right=1000, wrong=["'a' instead of 'b'"])).held
    assert not judged(run(), soak.Tally(right=1000, lost=["status 500"])).held
    assert not judged(run(), soak.Tally(aborted=9)).held, "nobody was answered"


def test_a_server_under_load_for_ten_seconds(tmp_path: Path) -> None:
    """R7 in short."""
    setting = Setting(True, str(tiny_model(tmp_path / "tiny")), tmp_path)
    found = asyncio.run(soak.soaked(setting))
    assert found.held, found.ours
