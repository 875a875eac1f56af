"""What is sent and when: arrival laws, length laws and prompts as pure functions of the settings and a seed.

A prompt is a list of stretches `(key, tokens)`; what a stretch contains depends on seed and key only. So a prefix
shared by a group, a block shared in a trace and a tail of one request are the same thing with different keys:

    --shared-prefix 32 --groups 2      ("group/0", 32) ("request/7", 96)
    Mooncake's hash_ids [0, 14]        ("block/0", 512) ("block/14", 246)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from random import Random
from typing import Any

from headrace.bench.settings import BenchSettings, parse_extra, parse_range
from headrace.core.config import BadSetting
from headrace.workload.arrival import Arrival
from headrace.workload.laws import Count, parse_count
from headrace.workload.settings import MAX_REQUESTS
from headrace.workload.times import gamma_gaps
from headrace.workload.traces import read_trace

Stretch = tuple[str, int]  # (key, tokens)

_HELD_BYTES = 64 << 20  # request bodies made before the clock starts; later ones are made while waiting
_WORDS = (
    "apple basket bridge button candle castle cloud corner cotton desert dinner doctor engine farmer finger flower "
    "forest garden ghost glass hammer harbor honey island jacket kitchen ladder lemon letter market mirror morning "
    "mountain music needle number ocean orange paper pencil picture pillow planet pocket rabbit river saddle school "
    "shadow silver spring station stone summer table thunder ticket tiger tower train valley village water window"
).split()


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send."""

    index: int
    at_s: float | None  # after the start of the run; None: when a connection is free
    stretches: tuple[Stretch, ...]
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.stretches)


def parse_lengths(text: str, flag: str) -> Count:
    """'128', '64:256' (uniform, both included), 'ln:128:0.8' (log-normal: median, sigma of the logarithm) or another
    law of `workload.laws`."""
    try:
        return parse_count(text)
    except BadSetting as error:
        raise BadSetting(f"--{flag}: {error}") from error


def arrivals(rate: float, burstiness: float, rng: Random) -> Iterator[float]:
    """Seconds from the start of the run; the first request comes at 0."""
    return accumulate(gamma_gaps(rate, burstiness, rng), initial=0.0)


def jobs(settings: BenchSettings) -> list[Job]:
    """All requests of a run, in the order they are sent."""
    rows = read_trace(settings.trace, row_limit(settings)) if settings.trace else None
    made = drawn_jobs(settings) if rows is None else traced_jobs(settings, rows)
    if settings.rate is None:
        return made
    times = arrivals(settings.rate, settings.burstiness, Random(f"{settings.seed}/arrivals"))
    return [Job(job.index, at_s, job.stretches, job.output_tokens) for job, at_s in zip(made, times, strict=False)]


def row_limit(settings: BenchSettings) -> int:
    """Rows of the trace to read."""
    return min(settings.requests or MAX_REQUESTS, settings.limit or MAX_REQUESTS)


def drawn_jobs(settings: BenchSettings) -> list[Job]:
    """Requests whose lengths follow `--input` and `--output`."""
    inputs, outputs = parse_lengths(settings.input, "input"), parse_lengths(settings.output, "output")
    rng = Random(f"{settings.seed}/lengths")
    made = []
    for index in range(settings.requests or 100):
        tokens = inputs(rng)
        shared = min(settings.shared_prefix, tokens)
        parts = ((f"group/{index % settings.groups}", shared), (f"request/{index}", tokens - shared))
        made.append(Job(index, None, tuple(part for part in parts if part[1]), outputs(rng)))
    return made


def traced_jobs(settings: BenchSettings, rows: Iterable[Arrival]) -> list[Job]:
    """Requests of a trace, at its times divided by `--trace-speed`."""
    made = []
    for index, row in enumerate(rows):
        if settings.rate is None and row.at_s is None:
            raise BadSetting(f"{settings.trace} has lengths but no arrival times; give --rate")
        at_s = None if row.at_s is None else row.at_s / settings.trace_speed
        made.append(Job(index, at_s, row_stretches(row, index), row.output_tokens))
    return made


def row_stretches(row: Arrival, index: int) -> tuple[Stretch, ...]:
    """Blocks that the trace names, then what it does not name."""
    return tuple(
        (f"request/{index}" if stretch.name is None else f"block/{stretch.name}", stretch.tokens)
        for stretch in row.prompt
    )


def warmup_jobs(settings: BenchSettings, measured: list[Job]) -> list[Job]:
    """Requests as long as the first measured ones but with contents of their own, so that they warm no cache."""
    return [
        Job(index, None, ((f"warmup/{index}", job.prompt_tokens),), job.output_tokens)
        for index, job in enumerate(islice(measured, settings.warmup))
    ]


def prompt_ids(stretches: tuple[Stretch, ...], ids: range, seed: int) -> list[int]:
    """Token ids of a prompt, exactly as many as its stretches say."""
    drawn = (Random(f"{seed}/{key}").choices(ids, k=tokens) for key, tokens in stretches)
    return list(chain.from_iterable(drawn))


def prompt_text(stretches: tuple[Stretch, ...], seed: int) -> str:
    """Words of about one token each, as many as the stretches have tokens."""
    drawn = (Random(f"{seed}/{key}").choices(_WORDS, k=tokens) for key, tokens in stretches)
    return " ".join(chain.from_iterable(drawn))


def body(settings: BenchSettings, model: str, job: Job) -> bytes:
    """The JSON of one request. Keys that `--extra` sets to null are left out."""
    fields: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": job.output_tokens,
        "temperature": settings.temperature,
    }
    if settings.ignore_eos:
        fields["ignore_eos"] = True
    if settings.endpoint == "chat":
        fields["messages"] = [{"role": "user", "content": prompt_text(job.stretches, settings.seed)}]
    elif settings.prompt == "text":
        fields["prompt"] = prompt_text(job.stretches, settings.seed)
    else:
        fields["prompt"] = prompt_ids(job.stretches, parse_range(settings.id_range), settings.seed)
    fields |= parse_extra(settings.extra)
    kept = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(kept, separators=(",", ":")).encode()


def with_bodies(settings: BenchSettings, model: str, made: list[Job]) -> Iterator[tuple[Job, bytes]]:
    """Jobs with their bodies: the first 64 MiB made at once, so that sending costs little, the others on demand."""
    pairs = ((job, body(settings, model, job)) for job in made)
    held: list[tuple[Job, bytes]] = []
    held_bytes = 0
    while held_bytes < _HELD_BYTES and (pair := next(pairs, None)):
        held.append(pair)
        held_bytes += len(pair[1])
    return chain(held, pairs)
