"""`headrace bench roofline` and `headrace bench quality` with a random model of a few thousand weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny_model

from headrace.cli import main, parser
from headrace.cli.quality import formats
from headrace.device.reference import speed

SMALL = ("--kv-memory", "8MiB", "--threads", "1", "--max-running", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products too small to say anything about a machine, but the same code."""
    monkeypatch.setattr(speed, "_PRODUCTS", ((32, 64, 32),))
    monkeypatch.setattr(speed, "_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "_LEAST_S", 1e-4)


def test_the_roofline_is_measured_and_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, html = tmp_path / "roofline.json", tmp_path / "roofline.html"
    asked = ("--requests", "1,3", "--contexts", "64", "--prompts", "32", "--rounds", "1")
    files = ("--save", str(saved), "--html", str(html))
    assert main(["bench", "roofline", str(model), *asked, *files, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "memory is read at" in printed and "lost most to" in printed
    found = json.loads(saved.read_text())
    assert [(one["rows"], one["context"]) for one in found["decode"]] == [(1, 64), (3, 64)]
    assert all(one["reached_s"] > 0 < one["limit_s"] for one in found["decode"])
    assert found["flops_per_s"]["fp32"] > 0 and found["prefill"][0]["reached_s"] > 0
    assert "<svg" in html.read_text()


def test_quality_compares_the_formats_of_the_device_room(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"fp32", "bf16"} <= formats().keys() and "auto" not in formats()
    saved = tmp_path / "quality.json"
    asked = ("--formats", "bf16", "--tokens", "200", "--window", "64", "--save", str(saved))
    assert main(["bench", "quality", str(model), *asked, *SMALL]) == 0
    assert "bf16" in capsys.readouterr().out
    found = json.loads(saved.read_text())["formats"]
    assert found["fp32"]["ratio"] == 1.0 and found["fp32"]["agreement"] == 1.0
    assert found["bf16"]["ratio"] == pytest.approx(1.0, abs=0.05) and found["bf16"]["kl_mean"] > 0


@pytest.mark.parametrize(
    "words,expected",
    [
        (["roofline", "--requests", "0"], "--requests"),
        (["roofline", "--contexts", "many"], "--contexts"),
        (["roofline", "--rounds", "0"], "--rounds"),
        (["roofline", "--html", "no/such/folder/page.html"], "no/such/folder"),
        (["quality", "--formats", "int1"], "int1"),
        (["quality", "--window", "2"], "--window"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    printed = capsys.readouterr().err
    assert expected in printed and "Traceback" not in printed


def test_measuring_a_server_needs_no_word() -> None:
    args = parser().parse_args(["bench", "--compare", "a.json", "b.json"])
    assert args.run.__module__ == "headrace.cli.bench"
