"""Two thousand of the mutants of `make fuzz`, the same ones every time, in a process of its own with little memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzz_models.py"


def test_mutants_of_model_files_are_opened_or_refused() -> None:
    command = [sys.executable, str(FUZZ), "2000", "--workers", "1", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (opened|BadModelFile|BadTokenizer)", done.stdout)}
    assert sum(counts.values()) == 2000
    assert min(counts["opened"], counts["BadModelFile"]) > 200, counts  # mutants of both kinds, or nothing is tried
