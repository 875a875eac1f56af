"""`headrace calibrate` from the command line, with a random model of a few thousand weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny_model

from headrace.cli import main
from headrace.sim.calibration import load
from headrace.sim.run import simulate
from headrace.workload.settings import WorkloadSettings, workload

FLAGS = ("--quick", "--kv-memory", "16MiB", "--threads", "1", "--token-budget", "64", "--max-running", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "tiny")


def test_a_calibration_is_measured_stored_and_simulated(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.json"
    assert main(["calibrate", str(model), *FLAGS, "--out", str(out)]) == 0
    found = load(out)
    assert len(found.points) >= 20 and found.origin.model == "tiny" and found.origin.shape.layers == tiny_model.LAYERS
    assert found.capacity.block_tokens == 16 and found.capacity.max_context_tokens == tiny_model.CONTEXT
    assert found.token_budget == 64 and found.settings.max_running == 8
    assert found.row_sizes and 0 < found.host_s < 1
    assert set(found.origin.versions) >= {"headrace", "torch", "python"} and found.origin.threads == 1
    assert found.fitted.kind in found.errors
    printed = capsys.readouterr()
    assert "<- stored" in printed.out and "measured range" in printed.out and str(out) in printed.err
    totals = simulate(workload(WorkloadSettings("poisson:5", "8:60,4:16", requests=40)), found.site()).totals
    assert totals.completed == 40


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--rows", "0"], "--rows"),
        (["--context", "31"], "--context"),
        (["--rounds", "1000"], "--rounds"),
        (["--kv-memory", "256KiB", "--rows", "64", "--max-running", "64"], "KV memory"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: Path, flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(model), *FLAGS, *flags, "--out", "/dev/null"]) == 2
    printed = capsys.readouterr().err
    assert expected in printed and "Traceback" not in printed
