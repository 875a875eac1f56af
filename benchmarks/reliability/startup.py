"""From the command to the first request that is taken, or to the sentence that says why not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

from headrace.cli import COMMANDS
from reliability.check import Found, Setting, s
from reliability.running import HEADRACE, client, serving, until

_BAD = (
    ("--port", "99999999"),
    ("--kv-memory", "much"),
    ("--dtype", "fp7"),
)


async def starts(setting: Setting) -> Found:
    """ready in 10 s (135M); any command imports what it needs and explains itself in 0.3 s; bad settings and a port
    that is taken end it in 2 s with one clear line"""
    begin = time.monotonic()
    async with serving(setting.model, setting.folder, *setting.flags) as server, client() as http:
        await until(http, server.url, True, 60)
        ready_s = time.monotonic() - begin
        taken = ("--port", server.url.rpartition(":")[2])
        refused = [await asyncio.to_thread(refusing, setting.model, flags) for flags in (*_BAD, taken)]
    tries = 1 if setting.short else 3
    helps = {name: await asyncio.to_thread(helping, name, tries) for name in COMMANDS}
    slow = max(helps, key=lambda name: helps[name])
    slowest = max(seconds for seconds, _, _ in refused)
    slack = setting.slack
    wrong = [f"exit status {status} and {text!r}" for _, status, text in refused if status != 2 or not text]
    told = f"ready in {s(ready_s)}, bad settings refused in {s(slowest)}"
    told += f", the slowest command to explain itself is {slow}, in {helps[slow]:.2f} s"
    held = ready_s <= 10 * slack and helps[slow] <= 0.3 * slack and slowest <= 2 * slack and not wrong
    return Found("; ".join([told, *wrong]), held)


def helping(command: str, tries: int) -> float:
    """Seconds of `headrace COMMAND --help` beyond an interpreter that does nothing, the best of some tries."""
    asking = [*HEADRACE, command, "--help"]
    return min(run_s(asking) - run_s([sys.executable, "-c", "pass"]) for _ in range(tries))


def run_s(command: list[str]) -> float:
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def refusing(model: str, flags: tuple[str, ...]) -> tuple[float, int, str]:
    """(seconds, exit status, the last line printed)."""
    begin = time.monotonic()
    done = subprocess.run([*HEADRACE, "serve", model, *flags], capture_output=True, text=True, check=False, timeout=60)
    lines = done.stderr.strip().splitlines()
    return time.monotonic() - begin, done.returncode, lines[-1] if lines else ""
