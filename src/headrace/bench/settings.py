"""What `headrace bench` may be told, and the bounds of it. Values only: nothing here sends or measures.

Times are seconds everywhere, also in `--slo`. The API key is read but never saved: `public()` leaves it out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from headrace.core.config import BadSetting, setting
from headrace.workload.arrival import MAX_TOKENS
from headrace.workload.settings import MAX_REQUESTS

SLO_METRICS = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is sent to the server, how fast, and where the results go."""

    url: str = setting("http://127.0.0.1:8000/v1", "the server's base URL")
    model: str | None = setting(None, "model to ask for; by default the first of /models")
    api_key: str | None = setting(None, "sent as a bearer token, never saved; better set as HEADRACE_API_KEY")
    endpoint: str = setting("completions", "which API to measure", ("completions", "chat"))
    prompt: str = setting(
        "ids", "prompts as token ids (exact lengths) or as words (about one token each); chat is words", ("ids", "text")
    )
    id_range: str = setting("1000:30000", "LO:HI, the token ids that prompts are made of: usual words in most models")
    requests: int | None = setting(None, "requests to send: 100 by default, with --trace all of it")
    concurrency: int | None = setting(
        None, "requests in flight: in a closed loop exactly so many (8); with --rate or --trace at most (no limit)"
    )
    rate: float | None = setting(None, "open loop: requests per second, or inf to send all at once")
    burstiness: float = setting(
        1.0, "shape of the Gamma law of the gaps under --rate: 1 is Poisson, less is burstier, more is more even"
    )
    trace: Path | None = setting(None, "replay a trace: Azure or BurstGPT CSV, Mooncake JSONL, or JSONL of our own")
    trace_speed: float = setting(1.0, "replay this many times faster")
    limit: int | None = setting(None, "read only so many rows of the trace")
    input: str = setting("128", "prompt tokens: N, LO:HI (uniform) or ln:MEDIAN:SIGMA (log-normal)")
    output: str = setting("128", "output tokens, written as --input")
    shared_prefix: int = setting(0, "first tokens that all prompts of a group have in common, part of --input")
    groups: int = setting(1, "how many different shared prefixes")
    slo: str | None = setting(
        None, "promises in seconds, such as ttft=1.0,tpot=0.05; also itl (a request's longest gap) and e2e"
    )
    seed: int = setting(0, "of arrivals, lengths and prompts; change it to miss a cache filled by an earlier run")
    temperature: float = setting(0.0, "0 is greedy")
    ignore_eos: bool = setting(True, "ask for exactly --output tokens; not in OpenAI's API, so some servers refuse")
    extra: str = setting("{}", "JSON object merged into every request; null removes a key")
    keep_alive: bool = setting(True, "reuse connections")
    timeout: float = setting(600.0, "seconds a request may take from the moment it is sent")
    warmup: int = setting(2, "requests sent before the clock starts, one after the other")
    save: Path | None = setting(None, "write settings, summary and every token's time to this JSON file")
    html: Path | None = setting(None, "write a self-contained page with plots")
    progress: bool = setting(True, "show progress when stderr is a terminal")
    compare: tuple[Path, ...] = setting((), "send nothing: print saved results side by side, as ratios to the first")

    def __post_init__(self) -> None:
        check_numbers(self)
        parse_url(self.url)
        parse_range(self.id_range)
        parse_slo(self.slo)
        parse_extra(self.extra)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise BadSetting("--api-key has characters that no HTTP header may carry; check how it was pasted")

    @property
    def open_loop(self) -> bool:
        """Requests are sent when they are due, not when an answer has come."""
        return self.rate is not None or self.trace is not None

    def public(self) -> dict[str, Any]:
        """All settings but the secret one, as JSON values: paths as text, infinity as "inf"."""
        values = dataclasses.asdict(self)
        del values["api_key"]
        return {name: _plain(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Target:
    """A base URL taken apart."""

    secure: bool
    host: str
    port: int
    path: str  # without a slash at its end

    @property
    def authority(self) -> str:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_url(url: str) -> Target:
    """Raises BadSetting unless it is http(s)://host[:port][/path]."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadSetting(f"--url {url!r} is not a URL: {error}") from error
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise BadSetting(f"--url {url!r} is not a base URL; write http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise BadSetting("--url carries a user, a query or a fragment; give a key with --api-key and a bare base URL")
    secure = parts.scheme == "https"
    return Target(secure, parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/"))


def parse_range(text: str) -> range:
    """'1000:30000' as the ids 1000 to 30000, both included."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high) < 2**31):
        raise BadSetting(f"--id-range {text!r} is not LO:HI; write 1000:30000 or a range inside the model's vocabulary")
    return range(int(low), int(high) + 1)


def parse_slo(text: str | None) -> Mapping[str, float]:
    """'ttft=1.0,tpot=0.05' as seconds by metric; empty without promises."""
    promises: dict[str, float] = {}
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition("=")
        seconds = _number(value)
        if name.strip() not in SLO_METRICS or not 0 < seconds < math.inf:
            raise BadSetting(f"--slo {part!r} is not METRIC=SECONDS with one of {', '.join(SLO_METRICS)}")
        promises[name.strip()] = seconds
    return promises


def parse_extra(text: str) -> Mapping[str, Any]:
    """The JSON object of `--extra`."""
    try:
        extra = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSetting(f"--extra is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise BadSetting('--extra is not a JSON object; write {"top_p": 0.9}')
    return extra


def check_numbers(settings: BenchSettings) -> None:
    """Every number is within what a run can mean. NaN fails every comparison, hence the form of the conditions."""
    bounds: dict[str, tuple[float, float]] = {
        "requests": (1, MAX_REQUESTS),
        "concurrency": (1, 65_536),
        "rate": (1e-6, math.inf),
        "burstiness": (1e-3, 1e6),
        "trace_speed": (1e-6, math.inf),
        "limit": (1, MAX_REQUESTS),
        "shared_prefix": (0, MAX_TOKENS),
        "groups": (1, MAX_REQUESTS),
        "temperature": (0, 100),
        "timeout": (1e-3, 1e7),
        "warmup": (0, 10_000),
    }
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise BadSetting(f"--{flag} is {value}; it must be between {low:g} and {high:g}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path) or (isinstance(value, float) and math.isinf(value)):
        return str(value)
    return value
