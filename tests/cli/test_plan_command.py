"""`headrace plan` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.cli import main


def plan(*words: str) -> int:
    return main(["plan", *words])


def test_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    assert plan("fit", "llama-3.1-8b", "--device", "L40S", "--show-work", "--json", str(out)) == 0
    assert "requests side by side" in capsys.readouterr().out
    assert json.loads(out.read_text())["subject"] == "llama-3.1-8b in bf16 on L40S"
    assert plan("fit", "llama-3.1-70b", "--device", "L40S") == 2
    assert "What would fit: " in capsys.readouterr().err
