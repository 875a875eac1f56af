"""A server that a check starts as a user would, and clients that note what they got and when. Owns the process: when
the block ends, nothing of it is left."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import psutil

HEADRACE = (sys.executable, "-m", "headrace.cli")
_START_S = 120.0
_TESTS = Path(__file__).parents[2] / "tests"


def tiny_model(folder: Path) -> Path:
    """A random model of a few thousand weights."""
    sys.path.insert(0, str(_TESTS / "cli"))
    import tiny_model as made  # type: ignore[import-not-found]

    written: Path = made.write(folder, max_position_embeddings=8192)
    return written


class Server:
    """A running `headrace serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.lines: list[str] = []  # what it has printed
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    async def listening(self) -> None:
        """Until it takes requests; raises RuntimeError with what it printed if it ends before."""
        await asyncio.to_thread(self._listening.wait, _START_S)
        if not self.url:
            raise RuntimeError("the server did not start: " + "".join(self.lines[-20:]))

    @property
    def worker(self) -> psutil.Process:
        """The process that computes; raises LookupError while there is none."""
        for child in psutil.Process(self.process.pid).children():
            if "worker" in " ".join(child.cmdline()):
                return child
        raise LookupError("the server has no worker process; does it run with --engine process?")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, timeout_s: float) -> int:
        """Its exit status."""
        return await asyncio.to_thread(self.process.wait, timeout_s)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"Listening on (\S+)", line):
                self.url = found[1]
                self._listening.set()
        self._listening.set()


@asynccontextmanager
async def serving(
    model: str | Sequence[str], folder: Path, *flags: str, command: Sequence[str] = HEADRACE
) -> AsyncIterator[Server]:
    """A server of one model or several, on a free port with a state directory of its own, killed at the end with all
    it started."""
    state = folder / f"state-{time.monotonic_ns()}"
    state.mkdir(mode=0o700)
    fixed = ("--port", "0", "--state-dir", str(state), "--embedding-model", "none", "--dtype", "fp32")
    models = [model] if isinstance(model, str) else model
    process = _start([*command, "serve", *models, *fixed, *flags])
    server = Server(process)
    try:
        await server.listening()
        yield server
    finally:
        left = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in left:
            if child.is_running():
                child.kill()


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@dataclass(slots=True)
class Answer:
    """What became of one streamed request."""

    text: str = ""
    status: int = 0
    finish: str | None = None
    error: str | None = None  # from an error event, or of the connection
    done: bool = False  # [DONE] came
    retry_after: str | None = None
    seconds: float = 0.0
    token_s: list[float] = field(default_factory=list)  # when each piece came

    @property
    def complete(self) -> bool:
        return self.done and self.finish is not None and self.error is None

    @property
    def tokens(self) -> int:
        """Pieces that came; a piece may be of several tokens where letters are."""
        return len(self.token_s)

    @property
    def longest_gap_s(self) -> float:
        gaps = [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]
        return max(gaps, default=0.0)


def client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=120, limits=limits, trust_env=False)


async def ask(
    http: httpx.AsyncClient, url: str, prompt: str | list[int], tokens: int, seed: int = 1, answer: Answer | None = None
) -> Answer:
    """A streamed completion of exactly so many tokens, drawn with this seed; never raises for what the server does.
    Who cannot wait for it hands in an `answer` to watch."""
    answer, begin = answer or Answer(), time.monotonic()
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": seed, "stream": True}
    try:
        request = http.stream("POST", f"{url}/v1/completions", json=body | {"ignore_eos": True})
        async with request as response:
            answer.status, answer.retry_after = response.status_code, response.headers.get("retry-after")
            async for line in response.aiter_lines():
                _take(line, answer)
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - begin
    return answer


def _take(line: str, answer: Answer) -> None:
    if line == "data: [DONE]":
        answer.done = True
    elif line.startswith("data: "):
        event = msgspec.json.decode(line.removeprefix("data: "))
        if "error" in event:
            answer.error = str(event["error"])
        for choice in event.get("choices", ()):
            answer.text += choice.get("text") or ""
            answer.finish = choice.get("finish_reason") or answer.finish
            answer.token_s.append(time.monotonic())


async def under_way(answers: list[Answer], count: int, within_s: float = 120.0) -> None:
    """Until so many have a token; raises TimeoutError."""
    begin = time.monotonic()
    while sum(one.tokens > 0 for one in answers) < count:
        if time.monotonic() - begin > within_s:
            raise TimeoutError(f"no token within {within_s:g} s")
        await asyncio.sleep(0.02)


def prompts(count: int, words: int = 12) -> list[str]:
    """Different ones, of so many words."""
    known = "river wheel mill water stone grain flour gate dam channel".split()
    return [" ".join(known[(at * 7 + word * (at + 3)) % len(known)] for word in range(words)) for at in range(count)]


async def status_of(http: httpx.AsyncClient, url: str, path: str = "/health/ready") -> int:
    """0 where nobody answers."""
    try:
        return (await http.get(url + path)).status_code
    except httpx.HTTPError:
        return 0


async def until(http: httpx.AsyncClient, url: str, ready: bool, timeout_s: float) -> float:
    """Seconds until /health/ready says 200, or does not; raises TimeoutError."""
    begin = time.monotonic()
    while time.monotonic() - begin < timeout_s:
        if (await status_of(http, url) == 200) == ready:
            return time.monotonic() - begin
        await asyncio.sleep(0.02)
    raise TimeoutError(f"the server was not {'ready' if ready else 'found to be down'} within {timeout_s:g} s")
