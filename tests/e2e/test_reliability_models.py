"""In short, what `make reliability` measures of models that come and go: R15 of its table."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from reliability import models
from reliability.check import Setting


def test_a_model_comes_and_goes_again_and_again(tmp_path: Path) -> None:
    found = asyncio.run(models.swapped(Setting(True, "", tmp_path)))
    assert found.held, found.ours
