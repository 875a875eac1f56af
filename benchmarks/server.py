"""Starts `headrace serve` as a user would and runs `headrace bench` against it; shared by the benchmarks here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEADRACE = [sys.executable, "-m", "headrace.cli"]


@contextmanager
def serving(*flags: str) -> Iterator[tuple[str, int]]:
    """A server on a free port until the block ends: its base URL (without /v1) and process id."""
    command = [*HEADRACE, "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield _url(process), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def bench(url: str, *flags: str) -> dict[str, Any]:
    """The saved JSON of one run of `headrace bench`."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "run.json"
        command = [*HEADRACE, "bench", "--url", f"{url}/v1", "--save", str(saved), "--no-progress", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if not saved.exists():
            raise SystemExit(f"headrace bench failed:\n{done.stdout}{done.stderr}")
        result: dict[str, Any] = json.loads(saved.read_text())
        return result


def _url(process: subprocess.Popen[str]) -> str:
    """Wait for the line that says where the server listens; show what it printed if it ends before."""
    assert process.stderr is not None
    printed = []
    for line in process.stderr:
        printed.append(line)
        if found := re.search(r"Listening on (\S+)", line):
            _drain(process)
            return found[1]
    raise SystemExit("the server did not start:\n" + "".join(printed))


def _drain(process: subprocess.Popen[str]) -> None:
    """Keep reading what the server prints, or it would block on a full pipe."""
    import threading

    stream = process.stderr
    assert stream is not None
    threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()
