"""In short, what `make reliability` measures of answers and files: R1, R6, R16 and R17 of its table."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from reliability import batches, damage, ends, hangups
from reliability.check import Check, Setting
from reliability.running import tiny_model

CHECKS: dict[str, Check] = {
    "R1": ends.answered,
    "R6": hangups.left,
    "R16": damage.found,
    "R17": batches.kept,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CHECKS)
def test_a_promise_is_kept(name: str, tmp_path: Path) -> None:
    setting = Setting(
        True,
        str(
            tiny_model(
                tmp_path / "tiny",
            )
        ),
        tmp_path,
    )
    found = asyncio.run(CHECKS[name](setting))
    assert found.held, found.ours
