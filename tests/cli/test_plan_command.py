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
    page = tmp_path / "fit.html"
    assert plan("fit", "llama-3.1-8b", "--device", "L40S", "--html", str(page)) == 0
    assert "Long contexts" in page.read_text() and "KV per token" in page.read_text()
    assert plan("fit", "llama-3.1-70b", "--device", "L40S") == 2
    assert "What would fit: " in capsys.readouterr().err


SMALL = ["--devices", "2xL40S", "--requests", "40", "--arrivals", "poisson:3", "--lengths", "100:600,20:120"]


def test_a_plan_is_found_written_and_simulated_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, html, numbers = (tmp_path / name for name in ("plan.toml", "plan.html", "plan.json"))
    words = ["--slo", "ttft=1.0,tpot=0.05", "--formats", "bf16", "--processes", "1"]
    files = ["--out", str(out), "--html", str(html), "--json", str(numbers)]
    assert plan("llama-3.1-8b", *SMALL, *words, *files, "--show-work") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("RECOMMENDED for cost") and "tokens of KV" in printed
    found = json.loads(numbers.read_text())["recommended"]
    assert "How sure is this?" in html.read_text()
    again = tmp_path / "again.json"
    assert main(["simulate", "--plan", str(out), "--json", str(again)]) == 0
    simulated = json.loads(again.read_text())["simulations"][0]
    assert simulated["end to end mean ms"] == pytest.approx(1e3 * found["e2e_s"], rel=1e-5)
    assert simulated["SLO kept"] == pytest.approx(found["kept"], rel=1e-5)


def test_a_newcomer_answers_questions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["llama-3.1-8b", "1xL40S", "20", "", "chat", "patient"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert plan("--interactive", "--requests", "20", "--formats", "bf16", "--processes", "1") == 0
    assert "on 1 L40S" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["llama-3.1-9b"], "did you mean"),
        (["llama-3.1-8b", "--formats", "fp7"], "fp7"),
        (["llama-3.1-8b", "--devices", "2x8xH100-SXM"], "@ib-ndr"),
        (["llama-3.1-8b", "--arrivals", "closed:4"], "arrivals with a rate"),
        (["llama-3.1-8b", "--simulations", "0"], "--simulations"),
        (["llama-3.1-8b", "--out", "/no/such/folder/plan.toml"], "/no/such/folder"),
    ],
)
def test_bad_questions_get_a_clear_no(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*words) == 2
    printed = capsys.readouterr().err
    assert expected in printed and "Traceback" not in printed


def test_a_mix_of_a_measured_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = {
        "gpu_info": {"small": {"cost": 1.0, "tputs": [[2]]}, "large": {"cost": 3.0, "tputs": [[5]]}},
        "workload_distribution": [[1.0]],
        "total_request_rate": 4.0,
    }
    table = tmp_path / "table.json"
    table.write_text(json.dumps(content))
    page = tmp_path / "mix.html"
    assert plan("mix", "--table", str(table), "--html", str(page)) == 0
    assert "CHEAPEST: 2 small" in page.read_text()
    assert capsys.readouterr().out.startswith("CHEAPEST: 2 small for $2.00 an hour.")
    assert plan("mix", "llama-3.1-8b") == 2
    assert "--slo" in capsys.readouterr().err


def test_roles_by_published_coefficients(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "roles.json"
    words = ["--requests", "30", "--arrivals", "poisson:1", "--slo", "ttft=0.4,tpot=0.1", "--json", str(out)]
    assert plan("roles", "--published", *words, "--show-work") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(("APART", "TOGETHER")) and "Work:" in printed
    assert {one["role"] for one in json.loads(out.read_text())["phases"]} == {"prefill", "decode", "both"}
    assert plan("roles", "--published") == 2
    assert "--slo" in capsys.readouterr().err


def test_replicas_that_come_and_go(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, html = tmp_path / "elastic.toml", tmp_path / "elastic.html"
    words = ["--arrivals", "poisson:0.02", "--requests", "12", "--slo", "ttft=60", "--most", "1"]
    assert plan("elastic", "llama-3.1-8b", "--device", "L40S", *words, "--out", str(out), "--html", str(html)) == 0
    assert capsys.readouterr().out.startswith("RECOMMENDED: 0 to 1")
    assert "The plan file" in html.read_text()
    assert main(["simulate", "--plan", str(out)]) == 0


def test_power_thoughts_and_apis(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = ["--lengths", "300:900,10:40", "--requests", "20", "--arrivals", "poisson:0.5", "--processes", "1"]
    assert (
        plan("power", "llama-3.1-8b", "--device", "L40S", "--servers", "2", "--extra", "50", "--minutes", "0.5", *rows)
        == 0
    )
    assert "MORE" in capsys.readouterr().out
    assert plan("thoughts", "qwen3-8b", "--seconds", "5") == 0
    assert capsys.readouterr().out.startswith("qwen3-8b within 5 s")
    table = tmp_path / "runs.csv"
    table.write_text("p,o,s\n100,1,0.2\n100,50,1.2\n1000,1,0.5\n1000,50,1.5\n")
    assert plan("api", str(table), "--model", "llama-3.1-8b", "--device", "L40S") == 0
    assert "ms a token" in capsys.readouterr().out
    assert plan("api", str(tmp_path / "none.csv")) == 2
