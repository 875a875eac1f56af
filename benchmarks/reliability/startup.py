"""From the command to the first request that is taken, or to the sentence that says why not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

from reliability.check import Found, Setting, s
from reliability.running import HEADRACE, client, serving, until

_BAD = (
    ("--port", "99999999"),
    ("--kv-memory", "much"),
    ("--dtype", "fp7"),
)


async def starts(setting: Setting) -> Found:
    """ready in 10 s (135M); the command line imports in 0.3 s; bad settings and a port that is taken end it in 2 s with
    one clear line"""
    begin = time.monotonic()
    async with serving(setting.model, setting.folder, *setting.flags) as server, client() as http:
        await until(http, server.url, True, 60)
        ready_s = time.monotonic() - begin
        taken = ("--port", server.url.rpartition(":")[2])
        refused = [await asyncio.to_thread(refusing, setting.model, flags) for flags in (*_BAD, taken)]
    imports = [await asyncio.to_thread(importing) for _ in range(3)]
    slowest = max(seconds for seconds, _, _ in refused)
    slack = setting.slack
    wrong = [f"exit status {status} and {text!r}" for _, status, text in refused if status != 2 or not text]
    told = f"ready in {s(ready_s)}, import {min(imports):.2f} s, bad settings refused in {s(slowest)}"
    held = ready_s <= 10 * slack and min(imports) <= 0.3 * slack and slowest <= 2 * slack and not wrong
    return Found("; ".join([told, *wrong]), held)


def importing() -> float:
    """Seconds of `import headrace.cli` beyond an interpreter that imports nothing."""
    return run_s("import headrace.cli") - run_s("pass")


def run_s(code: str) -> float:
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.monotonic() - begin


def refusing(model: str, flags: tuple[str, ...]) -> tuple[float, int, str]:
    """(seconds, exit status, the last line printed)."""
    begin = time.monotonic()
    done = subprocess.run([*HEADRACE, "serve", model, *flags], capture_output=True, text=True, check=False, timeout=60)
    lines = done.stderr.strip().splitlines()
    return time.monotonic() - begin, done.returncode, lines[-1] if lines else ""
