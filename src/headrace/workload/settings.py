"""Traffic as a few words: what a flag, a TOML table or an environment variable says, and the stream it stands for.

headrace simulate ... --arrivals gamma:6:0.5 --lengths sharegpt --requests 5000

[workload]                     # every table below starts from this one
requests = 5000
[workload.chat]                # and is a tenant of its own, merged with the others by time
arrivals = "poisson:5"
lengths = "sharegpt"
[workload.agents]
arrivals = "poisson:0.5"
turns = "2:20"
gap = "0.1@80+30@20"
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from headrace.core.config import BadSetting, setting
from headrace.core.types import SLO
from headrace.workload import streams
from headrace.workload.arrival import MAX_TOKENS, Arrival
from headrace.workload.laws import Count, Pairs, empirical, parse_count, parse_law, parse_pairs, zipf
from headrace.workload.sessions import Recipe, closed_loop, conversations
from headrace.workload.times import Closed, Times, parse_arrivals
from headrace.workload.traces import read_trace

MAX_REQUESTS = 10_000_000
_DEFAULT_REQUESTS = 5000


@dataclass(frozen=True, slots=True)
class WorkloadSettings:
    """What traffic comes: made from laws, or replayed from a trace."""

    arrivals: str | None = setting(
        None,
        "when requests come: even:RATE, poisson:RATE, gamma:RATE:SHAPE, mmpp:RATE@SECONDS,..., diurnal:RATE:SWING, "
        "hours:RATE,... or closed:CLIENTS; by default the trace's times, else poisson:1",
    )
    lengths: str = setting(
        "sharegpt",
        "prompt and answer: PROMPT,OUTPUT as laws (128, 64:256, exp:M, ln:MEDIAN:SIGMA, zipf:S:LO:HI), sharegpt, "
        "azure-chat, arxiv or reasoning; pairs draws those of the trace",
    )
    trace: Path | None = setting(
        None, "recorded traffic: Azure, BurstGPT or Vidur CSV, Mooncake's or our own JSON lines"
    )
    turns: str | None = setting(None, "turns of a conversation, as a law; by default every request stands alone")
    gap: str = setting("exp:5", "seconds between an answer and the next turn, as a law")
    shared_prefix: int = setting(0, "first prompt tokens that all requests of a group have in common")
    groups: str = setting("1", "how many shared prefixes: N, or N:S with popularity k^-S")
    tenants: str | None = setting(None, "how many tenants: N, or N:S with popularity k^-S")
    tenant: str = setting("", "name of the tenant, or what the numbered ones begin with")
    priority: int = setting(0, "of all requests; larger goes first where the ordering asks")
    slo: str | None = setting(None, "promises in seconds, such as ttft=1.0,tpot=0.05")
    max_new_tokens: int | None = setting(None, "what clients allow; answers are cut there")
    max_context: int = setting(131_072, "tokens beyond which a conversation is not continued")
    requests: int | None = setting(
        None, "how many requests; by default 5000, with --trace all, with --seconds no limit"
    )
    seconds: float | None = setting(None, "only requests that come in the first so many seconds after --skip")
    skip: float = setting(0.0, "leave out the first so many seconds")
    speed: float = setting(1.0, "times that the traffic comes faster")
    prompt_scale: float = setting(1.0, "factor of all prompt lengths")
    output_scale: float = setting(1.0, "factor of all answer lengths")
    seed: int = setting(0, "of every draw")

    def __post_init__(self) -> None:
        _check_numbers(self)
        parse_slo(self.slo)
        _check_text(self)

    @property
    def process(self) -> Times | Closed | None:
        """When requests come; None: when the trace says."""
        return parse_arrivals(self.arrivals or "poisson:1") if self.arrivals or not self.trace else None

    @property
    def clients(self) -> int | None:
        """In a closed loop, how many clients send one request after the other."""
        process = self.process
        return process.clients if isinstance(process, Closed) else None


def parts(toml: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The configuration files of the parts of a mixture, usually one, for `core.config.load(WorkloadSettings, ...)`:
    each table inside [workload] over what [workload] itself says. Raises BadSetting."""
    table = toml.get("workload", {})
    if not isinstance(table, Mapping):
        raise BadSetting("workload in the config file is not a table; write [workload]")
    common = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    named = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    if not named:
        return ({"workload": common},)
    return tuple({"workload": {**common, "tenant": name, **part}} for name, part in named.items())


def workload(settings: WorkloadSettings) -> Iterator[Arrival]:
    """A fresh stream of arrivals ordered by time; without times in a closed loop. The same settings give the same
    stream, in any process. Raises BadSetting and, while it is read, BadTrace."""
    seed = f"{settings.seed}/{settings.tenant}"
    process = settings.process
    rows = _replayed(settings) if settings.trace and settings.lengths != "pairs" else None
    if isinstance(process, Closed):
        stream = _asked(rows, process, seed) if rows else closed_loop(process.think_s, recipe(settings), seed)
    elif process is None:
        if rows is None:
            raise BadSetting("lengths pairs needs --arrivals, because only the trace's lengths are drawn")
        stream = _timed(rows)
    else:
        times = process(Random(f"{seed}/arrivals"))
        stream = _moved(rows, times) if rows else conversations(times, recipe(settings), seed)
    return _cut(settings, stream, closed=isinstance(process, Closed))


def recipe(settings: WorkloadSettings) -> Recipe:
    """What its conversations are like."""
    return Recipe(
        lengths=_pairs(settings),
        turns=parse_count(settings.turns, 1, 10_000) if settings.turns else None,
        gap_s=parse_law(settings.gap),
        prefix_tokens=settings.shared_prefix,
        groups=_popularity(settings.groups),
        tenants=_popularity(settings.tenants) if settings.tenants else None,
        tenant=settings.tenant,
        priority=settings.priority,
        slo=parse_slo(settings.slo),
        max_new_tokens=settings.max_new_tokens,
        max_context_tokens=settings.max_context,
    )


def mixture(parts: Sequence[WorkloadSettings]) -> Iterator[Arrival]:
    """All parts merged by time. Raises BadSetting if several have none."""
    if len(parts) == 1:
        return workload(parts[0])
    if any(part.clients for part in parts):
        raise BadSetting("arrivals closed:CLIENTS cannot be mixed with others; give rates")
    return streams.merge(*map(workload, parts))


def parse_slo(text: str | None) -> SLO | None:
    """'ttft=1.0,tpot=0.05'. Raises BadSetting."""
    if not text:
        return None
    promises: dict[str, float] = {}
    for promise in text.split(","):
        name, _, value = promise.strip().partition("=")
        try:
            promises[name] = float(value)
        except ValueError:
            promises[name] = math.nan
        if name not in ("ttft", "tpot") or not 0 < promises[name] < math.inf:
            raise BadSetting(f"slo {promise!r} is neither ttft=SECONDS nor tpot=SECONDS")
    return SLO(promises.get("ttft"), promises.get("tpot"))


def _pairs(settings: WorkloadSettings) -> Pairs:
    """The law of lengths; the trace's own are kept as 8 bytes a pair."""
    if settings.lengths != "pairs":
        return parse_pairs(settings.lengths)
    if settings.trace is None:
        raise BadSetting("lengths pairs draws from a trace; give --trace")
    prompts, outputs = array("i"), array("i")
    for row in read_trace(settings.trace, MAX_REQUESTS):
        prompts.append(row.prompt_tokens)
        outputs.append(row.output_tokens)
    return empirical(prompts, outputs)


def _popularity(text: str) -> Count | None:
    """'8' numbers 0 to 7 alike, '8:1.1' number k with weight (k+1)^-1.1; None for one alone."""
    count, _, exponent = text.partition(":")
    try:
        if not 1 <= int(count) <= MAX_REQUESTS:
            raise ValueError(count)
        law = zipf(float(exponent or 0), 1, int(count))
    except (ValueError, OverflowError) as error:
        raise BadSetting(f"{text!r} is not N or N:S with N of 1 to {MAX_REQUESTS:,} and an exponent S") from error
    return None if int(count) == 1 else lambda rng: int(law(rng)) - 1


def _replayed(settings: WorkloadSettings) -> Iterator[Arrival]:
    """The trace's requests with what the settings say about all of them."""
    assert settings.trace is not None
    slo = parse_slo(settings.slo)
    most = settings.max_new_tokens
    for row in read_trace(settings.trace, MAX_REQUESTS):
        yield replace(
            row,
            output_tokens=min(row.output_tokens, most or row.output_tokens),
            max_new_tokens=most or row.max_new_tokens,
            tenant=settings.tenant or row.tenant,
            priority=settings.priority or row.priority,
            slo=slo or row.slo,
        )


def _timed(rows: Iterator[Arrival]) -> Iterator[Arrival]:
    for row in rows:
        if row.at_s is None:
            raise BadSetting("the trace has lengths but no arrival times; give --arrivals")
        yield row


def _moved(rows: Iterator[Arrival], times: Iterator[float]) -> Iterator[Arrival]:
    """A trace's requests in its order, at other times."""
    return (replace(row, at_s=at_s) for row, at_s in zip(rows, times, strict=False))


def _asked(rows: Iterator[Arrival], process: Closed, seed: str) -> Iterator[Arrival]:
    """A trace's requests in its order, for clients that think."""
    rng = Random(f"{seed}/thinking")
    return (replace(row, at_s=None, gap_s=process.think_s(rng)) for row in rows)


def _cut(settings: WorkloadSettings, stream: Iterator[Arrival], closed: bool) -> Iterator[Arrival]:
    """Scaled, then sliced by time, then by count."""
    if (settings.prompt_scale, settings.output_scale) != (1.0, 1.0):
        stream = streams.longer(stream, settings.prompt_scale, settings.output_scale)
    if closed and (settings.skip or settings.seconds is not None or settings.speed != 1.0):
        raise BadSetting("a closed loop has no times to skip, cut or speed up; give --requests")
    if settings.speed != 1.0:
        stream = streams.faster(stream, settings.speed)
    if settings.skip or settings.seconds is not None:
        stream = streams.between(stream, settings.skip, settings.skip + (settings.seconds or math.inf))
    endless = settings.requests is None and settings.seconds is None and settings.trace is None
    return islice(stream, _DEFAULT_REQUESTS if endless else min(settings.requests or MAX_REQUESTS, MAX_REQUESTS))


def _check_numbers(settings: WorkloadSettings) -> None:
    """NaN fails every comparison, hence the form of the condition."""
    bounds: dict[str, tuple[float, float]] = {
        "shared_prefix": (0, MAX_TOKENS),
        "priority": (-1_000_000, 1_000_000),
        "max_new_tokens": (1, MAX_TOKENS),
        "max_context": (2, MAX_TOKENS),
        "requests": (1, MAX_REQUESTS),
        "seconds": (1e-3, 1e10),
        "skip": (0, 1e10),
        "speed": (1e-6, 1e6),
        "prompt_scale": (1e-6, 1e6),
        "output_scale": (1e-6, 1e6),
    }
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise BadSetting(f"--{flag} is {value}; it must be between {low:g} and {high:g}")


def _check_text(settings: WorkloadSettings) -> None:
    """Laws are read when they are given, not when the first request is drawn."""
    closed = settings.clients is not None
    if settings.lengths != "pairs":
        parse_pairs(settings.lengths)
    if settings.turns:
        parse_count(settings.turns, 1, 10_000)
        if closed:
            raise BadSetting("a closed loop has no conversations of several turns; give arrivals with a rate")
    parse_law(settings.gap)
    _popularity(settings.groups)
    if settings.tenants:
        _popularity(settings.tenants)
