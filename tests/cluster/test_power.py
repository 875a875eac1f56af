"""POLCA's control: the published sequence, and what holds of every other one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.cluster.power import BRAKED, FREE, Caps, next_caps

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "polca.json"


def test_the_published_sequence() -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"{GOLDEN} is missing")
    case, over = json.loads(GOLDEN.read_text())["unit_cases"]
    caps, seen = FREE, []
    for share in case["power"]:
        caps = next_caps(share, caps)
        seen.append(caps)
    assert [one.low_mhz for one in seen] == case["expected_lp_mhz"]
    assert [one.high_mhz for one in seen] == case["expected_hp_mhz"]
    assert over["expected"] == "powerbrake" and next_caps(over["power"][0], FREE) == BRAKED


@given(st.lists(st.floats(0.0, 1.2), min_size=1, max_size=40))
@bounded(max_examples=100, derandomize=True, deadline=None)
def test_low_priority_yields_first_and_everybody_recovers(shares: list[float]) -> None:
    caps: Caps = FREE
    for share in shares:
        before, caps = caps, next_caps(share, caps)
        assert caps.low_mhz <= caps.high_mhz
        if share > 1:
            assert caps == BRAKED
        elif caps.high_mhz < before.high_mhz:
            assert share > 0.89 and before.low_mhz == 1110
        if 0.84 <= share <= 0.89 and before != FREE:
            assert caps == before
    assert next_caps(0.74, caps) == FREE
