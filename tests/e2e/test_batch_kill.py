"""A batch outlives a server that is killed: no line that was reported as done is lost, none is answered twice."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import pytest
import tiny_model
from batch_kill import survive


@pytest.mark.slow  # R17 of `make reliability` kills a server in every run
def test_a_batch_survives_being_killed_twice(tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path / "tiny")
    flags = [str(model), "--kv-memory", "4MiB", "--embedding-model", "none", "--dtype", "fp32"]
    assert survive(flags, lines=40, tokens=3, kills=2, seed=3) == []
