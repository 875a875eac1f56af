"""Serve, record, and ask the simulator: the traffic reads back, the plans come out again, and nothing said is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from server import HEADRACE, serving

SECRET = "the password of the mill is swordfish and nobody must ever read it " * 4


def headrace(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HEADRACE, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    traffic, plans = folder / "traffic.jsonl", folder / "plans.jsonl"
    flags = ("smollm2", "--kv-memory", "200MiB", "--max-context", "1024", "--dtype", "fp32")
    with (
        serving(*flags, "--record", str(traffic), "--record-plans", str(plans)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):

        def ask(number: int) -> None:
            prompt = f"{SECRET}{number}"
            client.completions.create(model="smollm2", prompt=prompt, max_tokens=8 + number, temperature=0)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(8)))
    return traffic, plans


def test_the_traffic_is_lengths_and_names_only(recorded: tuple[Path, Path]) -> None:
    text = recorded[0].read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 8
    assert {line["output_tokens"] for line in lines} <= set(range(1, 17))
    assert "swordfish" not in text
    assert len({tuple(line["blocks"][:3]) for line in lines}) == 1, "what was shared is not seen to be"


def test_the_traffic_can_be_simulated(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    done = headrace(
        "simulate", "--model", "smollm2-135m", "--hardware", "L4", "--trace", recorded[0], "--json", numbers
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(numbers.read_text())["simulations"][0]
    assert found["requests completed"] == 8
    assert found["cached prompt tokens"] > 0


def test_the_plans_come_out_again(recorded: tuple[Path, Path]) -> None:
    done = headrace("replay", recorded[1])
    assert done.returncode == 0, done.stderr
    assert "8 requests" in done.stdout
    assert "plans are identical" in done.stdout
    assert headrace("replay", "--check", recorded[1]).stdout.count("\n") == 1


def test_a_changed_plan_is_found(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    lines = recorded[1].read_text().splitlines(keepends=True)
    at = next(at for at, line in enumerate(lines) if json.loads(line)["type"] == "arrive" and at > 5)
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(lines[:at] + lines[at + 1 :]))
    done = headrace("replay", changed)
    assert done.returncode == 1
    assert "the next differs" in done.stderr
    assert headrace("replay", tmp_path / "missing").returncode == 2
