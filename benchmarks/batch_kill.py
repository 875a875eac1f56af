"""A batch under a server that is killed at random moments, and what a batch costs those who wait for answers.

    python benchmarks/batch_kill.py                # 500 lines, ten kills with SIGKILL
    python benchmarks/batch_kill.py --ttft         # time to first token alone, and beside a batch

Every line that a batch has once reported as done must be in the output exactly once at the end, with one answer.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from server import HEADRACE, _url

WORDS = "river wheel mill water stone grain flour gate dam channel".split()


@contextmanager
def started(flags: list[str], state: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server on a state directory, killed at the end if it still runs."""
    command = [*HEADRACE, "serve", "--port", "0", "--state-dir", str(state), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield _url(process), process
    finally:
        process.kill()
        process.wait()


def input_file(lines: int, tokens: int, rng: random.Random) -> bytes:
    """Prompts of random words; a batch of completions."""
    made = []
    for at in range(lines):
        body = {"prompt": " ".join(rng.choices(WORDS, k=8)), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        made.append({"custom_id": f"line-{at}", "method": "POST", "url": "/v1/completions", "body": body})
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def create(url: str, content: bytes) -> str:
    """Upload a file and start its batch."""
    form = {"purpose": "batch"}
    file = httpx.post(f"{url}/v1/files", data=form, files={"file": ("in.jsonl", content)}, timeout=60).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    return str(httpx.post(f"{url}/v1/batches", json=asked, timeout=60).json()["id"])


def get(url: str, batch: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/v1/batches/{batch}", timeout=60).json()
    return found


def survive(flags: list[str], lines: int, tokens: int, kills: int, seed: int) -> list[str]:
    """Run a batch and kill the server `kills` times on the way. Returns what is wrong; empty: nothing."""
    rng = random.Random(seed)
    content = input_file(lines, tokens, rng)
    at = sorted(rng.sample(range(1, lines), kills))
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        state, batch, seen = Path(folder) / "state", "", 0
        for kill_at in (*at, None):
            with started(flags, state) as (url, process):
                batch = batch or create(url, content)
                seen = max(seen, _until(url, batch, kill_at, rng))
                if kill_at is not None:
                    process.send_signal(signal.SIGKILL)
                    continue
                wrong += _judge(url, batch, lines, seen)
    return wrong


def _until(url: str, batch: str, count: int | None, rng: random.Random) -> int:
    """Wait until so many lines are done (None: until the batch has ended) and a little longer. Returns the most lines
    that were reported as done."""
    seen = 0
    while True:
        now = get(url, batch)
        seen = max(seen, int(now["request_counts"]["completed"]))
        if now["status"] not in ("validating", "in_progress", "finalizing"):
            return seen
        if count is not None and seen >= count:
            time.sleep(rng.random() * 0.05)
            return seen
        time.sleep(0.01)


def _judge(url: str, batch: str, lines: int, seen: int) -> list[str]:
    now, wrong = get(url, batch), []
    if now["status"] != "completed" or now["request_counts"] != {"total": lines, "completed": lines, "failed": 0}:
        wrong.append(f"the batch ended as {now['status']} with {now['request_counts']}")
    if now["output_file_id"] is None:
        return [*wrong, "there is no output"]
    output = httpx.get(f"{url}/v1/files/{now['output_file_id']}/content", timeout=60).text
    ids = [json.loads(line)["custom_id"] for line in output.splitlines()]
    if sorted(ids) != sorted(f"line-{at}" for at in range(lines)):
        wrong.append(f"{lines} lines became {len(ids)}, {len(set(ids))} of them different")
    if len(set(ids)) < seen:
        wrong.append(f"{seen} lines were reported as done, and {len(set(ids))} are in the output")
    return wrong


def ttft(url: str, count: int, rng: random.Random) -> list[float]:
    """Seconds until the first token of `count` streams, one after the other, with pauses of random length."""
    seconds = []
    for _ in range(count):
        time.sleep(rng.random() * 0.3)
        prompt = " ".join(rng.choices(WORDS, k=96))
        body = {"prompt": prompt, "max_tokens": 8, "stream": True, "temperature": 0}
        begin = time.perf_counter()
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for number, _line in enumerate(answer.iter_lines()):
                if number == 0:
                    seconds.append(time.perf_counter() - begin)
    return seconds


def beside(flags: list[str], count: int) -> tuple[float, float, int]:
    """p99 of the time to first token alone and beside a batch, and how many lines the batch did meanwhile."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder, started(flags, Path(folder) / "state") as (url, _):
        ttft(url, 5, rng)
        alone = ttft(url, count, rng)
        batch = create(url, input_file(5_000, 64, rng))
        while get(url, batch)["request_counts"]["completed"] < 8:
            time.sleep(0.05)
        before = get(url, batch)["request_counts"]["completed"]
        with_batch = ttft(url, count, rng)
        return _p99(alone), _p99(with_batch), get(url, batch)["request_counts"]["completed"] - before


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft", action="store_true")
    parser.add_argument("--requests", type=int, default=100)
    args = parser.parse_args()
    flags = [args.model, "--kv-memory", "400MiB", "--max-context", "512", "--embedding-model", "none"]
    if args.ttft:
        alone, with_batch, lines = beside(flags, args.requests)
        print(f"TTFT p99: {1000 * alone:.0f} ms alone, {1000 * with_batch:.0f} ms beside a batch")
        print(f"ratio {with_batch / alone:.2f} (at most 1.5), {lines} lines of the batch done meanwhile")
        return int(with_batch > 1.5 * alone)
    wrong = survive(flags, args.lines, args.tokens, args.kills, args.seed)
    print("\n".join(wrong) or f"{args.lines} lines, {args.kills} kills: every line answered, each once")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
