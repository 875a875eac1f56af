"""`headrace simulate` from the outside: tables, sweeps, comparisons, pages, and the same result in every process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli import main

SMALL = ["--model", "llama-3.1-8b", "--hardware", "A10G", "--requests", "80"]


def simulate(*words: str) -> int:
    return main(["simulate", *SMALL, *words])


def test_a_question_and_its_answer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    words = ["--arrivals", "poisson:2", "--slo", "ttft=1.0", "--sweep", "rate=0.5:20"]
    assert simulate(*words, "--html", str(page), "--json", str(numbers)) == 0
    printed = capsys.readouterr()
    assert "HOLDS: TTFT <= 1.0 s for 0.99" in printed.out
    assert re.search(r"AT MOST [\d.]+ requests/s", printed.out)
    assert "requests/s: p99 TTFT" in printed.err
    assert "Goodput" in page.read_text()
    found = json.loads(numbers.read_text())
    assert 0.5 * found["highest_rate"] < found["planned_rate"] <= found["highest_rate"] / 1.05
    assert found["highest_rate"] == max(point["rate"] for point in found["sweep"] if point["holds"])
    assert found["simulations"][0]["requests completed"] == 80


def test_the_page_has_other_loads_even_without_a_sweep(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert simulate("--html", str(page)) == 0
    assert "Over load" in page.read_text()
    assert simulate("--arrivals", "closed:4", "--html", str(page)) == 0
    assert "Over load" not in page.read_text()


def test_two_settings_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, batch in (("calm", "chunked"), ("eager", "prefill-first")):
        (tmp_path / f"{name}.toml").write_text(f'[engine]\nbatch = "{batch}"\n[workload]\narrivals = "poisson:6"\n')
    assert simulate("--compare", str(tmp_path / "calm.toml"), str(tmp_path / "eager.toml")) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["calm", "eager"]
    longest = next(row for row in rows if row.startswith("longest ITL p99"))
    assert float(re.search(r"\(([\d.]+)x\)", longest)[1]) > 1.0  # type: ignore[index]


def test_the_same_seed_gives_the_same_log_in_every_process() -> None:
    """Must show 5: two processes, other hash seeds, one and two workers."""
    command = [sys.executable, "-m", "headrace.cli", "simulate", *SMALL, "--replicas", "2", "--turns", "1"]
    logs = []
    for seed, processes in (("0", "1"), ("1", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [*command, "--processes", processes], capture_output=True, text=True, check=True, env=environment
        )
        logs.append(re.search(r"seed 0, event log ([0-9a-f]{32})", done.stdout)[1])  # type: ignore[index]
    assert logs[0] == logs[1]
    other = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True, check=True)
    assert logs[0] not in other.stdout


@pytest.mark.parametrize("what", ["models", "devices", "links"])
def test_the_catalogue_is_listed(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--list", what]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 20


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sweep", "replicas=1:4"], "rate=LOW:HIGH"),
        (["--sweep", "rate=1:4"], "--slo"),
        (["--sweep", "rate=4:1", "--slo", "ttft=1"], "LOW < HIGH"),
        (["--hardware", "H1000"], "did you mean"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--html", "/no/such/folder/page.html"], "/no/such/folder"),
        (["--replicas", "0"], "--replicas"),
        (["--ordering", "alphabetical"], "alphabetical"),
        (["--compare", "missing.toml"], "missing.toml"),
    ],
)
def test_bad_questions_get_a_clear_no(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(*words) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
