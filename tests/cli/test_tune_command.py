"""`headrace tune` from the outside: what it says, that `simulate` and `serve` read what it writes, and clear noes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from headrace.cli import main, parser
from headrace.cli.tune import fixed
from headrace.core import config
from headrace.core.config import EngineSettings
from headrace.engine.policy import choose

SMALL = ["--hardware", "A10G", "--requests", "150", "--arrivals", "poisson:6", "--lengths", "100:400,20:60"]
TUNE = [*SMALL, "--slo", "ttft=1.0,tpot=0.2", "--budget", "16", "--processes", "1"]


def tune(*words: str) -> int:
    return main(["tune", *TUNE, *words])


def parsed(*words: str) -> argparse.Namespace:
    return parser().parse_args(["tune", *words])


def test_it_finds_and_writes_what_others_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given, out, numbers = tmp_path / "given.toml", tmp_path / "tuned.toml", tmp_path / "numbers.json"
    given.write_text("[engine]\nmax_running = 2\n[simulate]\nhost_ms = 1.0\n")
    assert tune("--config", str(given), "--batch", "chunked", "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert "BETTER on the held-out slice" in printed.out
    assert "max_running = " in printed.out
    assert "round 1 of" in printed.err
    assert f"written: {out}" in printed.err
    settings = config.load(EngineSettings, None, config.read_toml(out))
    assert settings.max_running > 2
    assert settings.batch == "chunked"
    choose(settings)  # as a server does
    assert parser().parse_args(["serve", "--config", str(out)]).config == out

    goods = []
    for file in (given, out):
        assert (
            main(["simulate", *SMALL, "--slo", "ttft=1.0,tpot=0.2", "--config", str(file), "--json", str(numbers)]) == 0
        )
        goods.append(json.loads(numbers.read_text())["simulations"][0]["SLO kept"])
    assert goods[1] > goods[0] + 0.1


def test_the_file_is_the_same_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert tune("--max-running", "4", "--ordering", "fcfs", "--out", str(tmp_path / name)) == 0
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    assert "max_running = 4\n" in (tmp_path / "one").read_text()  # fixed, and so as it was


def test_flags_fix_settings_and_files_do_not(tmp_path: Path) -> None:
    file = tmp_path / "given.toml"
    file.write_text('[engine]\nbatch = "static"\n')
    assert fixed(parsed("--ordering", "fcfs", "--token-budget", "64", "--no-prefix-cache", "--config", str(file))) == {
        "ordering",
        "token_budget",
        "prefix_cache",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--slo", ""], "--slo"),
        (["--budget", "3"], "--budget"),
        (["--held-out", "0.99"], "--held-out"),
        (["--held-out", "nan"], "--held-out"),
        (["--processes", "0"], "--processes"),
        (["--out", "/no/such/folder/tuned.toml"], "/no/such/folder"),
        (["--requests", "20"], "too little traffic"),
        (["--arrivals", "closed:3"], "closed loop"),
        (["--hardware", "H1000"], "did you mean"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--margin", "1"], "--margin is 1.0"),
        (["--trace", "nowhere.csv", "--arrivals", "poisson:1"], "nowhere.csv"),
        (
            "--ordering fcfs --admission free-blocks --batch chunked --preemption priority --max-running 9 "
            "--token-budget 64".split(),
            "every setting is fixed",
        ),
    ],
)
def test_bad_questions_get_a_clear_no(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(*words) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
