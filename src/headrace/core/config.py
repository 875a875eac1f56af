"""Frozen settings per room, read once: flags over environment over TOML over defaults. The only reader of the
environment and the only user of argparse besides `cli`.

A setting is a dataclass field with `setting(default, "help")`. From it come the flag (`--kv-memory`), the environment
variable (`HEADRACE_KV_MEMORY`) and the TOML key (`[device] kv_memory`), each parsed by the field's type.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

from headrace.core.types import HeadraceError

Bytes = NewType("Bytes", int)
S = TypeVar("S")

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": size for unit, size in list(_UNITS.items()) if unit not in ("", "b")}
_UNITS |= {f"{unit}i{b}": 2 ** (10 * power) for power, unit in enumerate("kmgt", 1) for b in ("", "b")}


class BadSetting(HeadraceError):
    """A setting that cannot be read; the message names it and where it came from."""


def parse_bytes(text: str) -> Bytes:
    """'2GiB', '512M' or '1073741824' as a number of bytes; Ki, Mi, Gi are powers of 1024, k, M, G of 1000."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write 2GiB, 512MiB or a number of bytes")
    return Bytes(int(float(match[1]) * _UNITS[match[2].lower()]))


def format_bytes(count: float) -> str:
    """1536 as '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


_PARSERS: Mapping[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: _parse_bool,
    Bytes: parse_bytes,
    Path: Path,
    tuple[Path, ...]: lambda text: tuple(Path(part) for part in text.split(",") if part),
}


def setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a flag, an environment variable and a TOML key."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What one replica's scheduler may do."""

    block_tokens: int = setting(16, "tokens in one KV block")
    token_budget: int | None = setting(
        None, "most tokens computed in one step; by default what --inter-token-ms allows, as measured step by step"
    )
    inter_token_ms: float = setting(
        250.0, "no step should take longer than this, so that streams keep flowing; larger gives more throughput"
    )
    max_running: int = setting(256, "most requests computed side by side")
    max_queue_requests: int = setting(1024, "waiting requests beyond which new ones are refused with 429")
    max_queue_tokens: int = setting(1_000_000, "waiting prompt tokens beyond which new requests are refused with 429")
    prefix_cache: bool = setting(True, "share the KV of equal prompt prefixes")
    ordering: str = setting(
        "fcfs",
        "who is next: fcfs, priority, shortest-prompt, vtc, drr, edd, eddc, mdd, mddc, urgency, prefix-groups, random "
        "or markov",
    )
    admission: str = setting(
        "free-blocks",
        "when a waiting request may start: free-blocks, reserve-all, past-future, conservative or aggressive",
    )
    batch: str = setting(
        "chunked", "what a step computes: chunked, prefill-first, splitfuse, orca, static, filling or layered"
    )
    preemption: str = setting(
        "last-arrived",
        "who yields: last-arrived, when memory runs out, priority, also to more urgent ones that wait, or swap, to all "
        "that precede it, best with --host-kv-memory",
    )
    host_kv_memory: Bytes = setting(
        Bytes(0),
        "memory of the host, such as 8GiB, for KV of requests that were preempted and of earlier turns; 0 is none",
    )
    priority_updates: float = setting(0.04, "priorities change so often per step under --ordering random and markov")
    speculate: str = setting(
        "off", "guess tokens and verify several in one step: off, or lookup in the request's own text"
    )
    draft_tokens: int = setting(8, "most tokens guessed for one request in one step")
    draft_control: str = setting("goodput", "how many of these are verified: goodput, as many as pay, or always, all")
    lanes: str = setting(
        "one",
        "streams of steps on the device: one, or prompts beside decodes, in shares that are fixed, set by feedback "
        "(semi-pd) or by prediction (nexus)",
    )
    lane_shares: str = setting(
        "50,50", "percent of the device for prompts and for decodes; semi-pd and nexus begin there, and may exceed 100"
    )
    first_token_ms: float = setting(
        1000.0, "under --lanes semi-pd, what a first token may take where its request promises nothing"
    )
    tenant_weights: str = setting("", "shares under --ordering vtc and drr, as name=weight,...; 1 for all others")
    length_window: int = setting(1000, "answers whose lengths predict those of others, where a policy predicts")


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """What the executor computes with."""

    dtype: str = setting(
        "auto",
        "weights in memory: auto keeps a file's own 4 or 8 bits where native kernels serve the model; fp32 is exact",
        ("auto", "fp32", "bf16", "q8", "q4"),
    )
    kv_dtype: str = setting(
        "auto",
        "keys and values in memory: auto is fp32 beside fp32 weights, else bf16",
        ("auto", "fp32", "bf16", "int8"),
    )
    kernels: str = setting(
        "auto", "what computes on a CPU: auto takes native where it serves the model", ("auto", "native", "torch")
    )
    device: str = setting("auto", "where to compute: auto takes CUDA when there is one", ("auto", "cpu", "cuda"))
    kv_memory: Bytes | None = setting(None, "memory for KV, such as 2GiB; by default most of what is free")
    max_context: int | None = setting(None, "most tokens of one request; by default the model's own limit")
    threads: int | None = setting(None, "compute threads; by default all cores")


@dataclass(frozen=True, slots=True)
class ModelsSettings:
    """How several models share one memory."""

    memory: Bytes | None = setting(
        None, "weights, activations and KV of all models together, such as 3GiB; by default most of what is free"
    )
    swap: str = setting(
        "latency",
        "when a request waits for a model that only fits once a busy one has gone: latency, that one takes no more "
        "requests; throughput, it does until somebody has waited for --swap-patience-s",
        ("latency", "throughput"),
    )
    swap_patience_s: float = setting(10.0, "seconds, under --swap throughput")
    keep_alive_s: float | None = setting(
        None, "a model that nobody uses for so many seconds goes; by default it stays until another needs the room"
    )
    keep_kv: bool = setting(True, "keep the KV of a model that goes as long as there is room, for when it comes back")
    pin: str = setting("", "models that never go, by name: a,b")


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What the server accepts."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 takes any free one")
    insecure: bool = setting(False, "allow an address other than loopback although nobody is asked for a key")
    served_name: str | None = setting(None, "the model's name in the API; by default derived from its source")
    max_body: Bytes = setting(Bytes(8 << 20), "largest request body")
    max_choices: int = setting(128, "largest n")
    embedding_model: str = setting(
        "all-minilm-l6-v2",
        "model behind /v1/embeddings, made for it or any that writes, named as MODEL; the default one is loaded only if"
        " it is here; none for none",
    )
    state_dir: Path | None = setting(
        None, "where files, batches and responses are kept; by default state/ beside the pulled models"
    )
    max_file: Bytes = setting(Bytes(100 << 20), "largest file that may be uploaded")
    max_stored: Bytes = setting(Bytes(4 << 30), "largest size of all files together")
    batch_requests: int = setting(8, "requests of batches that are computed side by side, behind all others")
    tool_parser: str = setting(
        "auto", "how the model calls tools: hermes, mistral or llama3; auto: as its chat template says"
    )
    reasoning: str = setting(
        "auto", "how the model marks its reasoning: think, mistral or none; auto: as its chat template says"
    )
    grammar_timeout_s: float = setting(5.0, "seconds that compiling one schema or grammar may take")
    drain_timeout_s: float = setting(30.0, "seconds that running requests get after SIGTERM")
    explained: int = setting(1000, "finished requests that the server can still explain")
    otlp_endpoint: str | None = setting(
        None, "send OpenTelemetry spans of requests to this collector, such as http://localhost:4318"
    )
    engine: str = setting(
        "process",
        "where the model computes: in a process of its own, which may crash and come back, or a thread of the server",
        ("process", "thread"),
    )
    record: Path | None = setting(
        None, "write when requests came, how long they were and what they shared to this file, never what they said"
    )
    record_plans: Path | None = setting(
        None, "write every step plan to this file, for `headrace replay`; it holds the token ids of all prompts"
    )
    metrics_prefix: str = setting("headrace:", "what metric names begin with; vllm: for dashboards that ask for that")


@dataclass(frozen=True, slots=True)
class KeySettings:
    """Who may use the server."""

    keys_file: Path | None = setting(None, "the keys; by default keys.sqlite3 beside the pulled models")


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Where the limits of keys are counted."""

    limits_redis: str | None = setting(
        None,
        "a Redis that counts for all servers that name it, as redis://HOST:PORT/0; better in HEADRACE_LIMITS_REDIS if "
        "it has a password; by default each server counts for itself",
    )
    limits_when_lost: str = setting(
        "closed",
        "while that Redis does not answer, calls of keys with limits are refused (closed), or each server counts for "
        "itself (open)",
        ("closed", "open"),
    )


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Give `parser` one flag per setting. A flag that is not given stays None, so that weaker sources may speak."""
    group = parser.add_argument_group(_section(settings), description=settings.__doc__)
    types = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind, default = _bare(types[field.name]), field.default
        shown = "" if default in (None, ()) else f" (default: {_show(kind, default)})"
        options: dict[str, Any] = {"dest": f"{_section(settings)}.{field.name}", "default": None}
        options["help"] = (field.metadata["help"] + shown).replace("%", "%%")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
            options["help"] = field.metadata["help"] + (" (default: yes)" if default else " (default: no)")
        elif kind == tuple[Path, ...]:
            options |= {"type": Path, "nargs": "+", "metavar": "PATH"}
        else:
            options["type"] = _complaining(_PARSERS[kind])
            options["choices"] = field.metadata["choices"] or None
            options["metavar"] = None if field.metadata["choices"] else _metavar(kind)
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def load(settings: type[S], flags: argparse.Namespace | None = None, toml: Mapping[str, Any] | None = None) -> S:
    """Resolve every field of `settings`; raises BadSetting with the source of the bad value."""
    types = get_type_hints(settings)
    section = _section(settings)
    table = (toml or {}).get(section, {})
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        kind = _bare(types[field.name])
        variable = "HEADRACE_" + field.name.upper()
        flag = getattr(flags, f"{section}.{field.name}", None)
        if flag is not None:
            values[field.name] = tuple(flag) if isinstance(flag, list) else flag
        elif variable in os.environ:
            values[field.name] = _parse(kind, os.environ[variable], f"environment variable {variable}")
        elif field.name in table:
            values[field.name] = _parse(kind, _text(table[field.name]), f"[{section}] {field.name} in the config file")
        _check_choice(field, values.get(field.name))
    unknown = set(table) - {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    if unknown:
        raise BadSetting(f"[{section}] in the config file has unknown keys: {', '.join(sorted(unknown))}")
    return settings(**values)


def read_toml(path: Path | None) -> Mapping[str, Any]:
    """The config file as tables, or nothing."""
    if path is None:
        return {}
    import tomllib  # 8 ms that most commands need not wait for

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"cannot read the config file {path}: {error}") from error


def home() -> Path:
    """Where Headrace keeps pulled models: $HEADRACE_HOME, else $XDG_CACHE_HOME/headrace, else ~/.cache/headrace."""
    if path := os.environ.get("HEADRACE_HOME"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def service_manager() -> tuple[str | None, float | None]:
    """Where systemd wants to hear from a service it started, and after how many seconds of silence it acts."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return os.environ.get("NOTIFY_SOCKET") or None, int(usec) / 1e6 if usec.isdecimal() and int(usec) else None


def api_key() -> str | None:
    """A key in the environment, where no list of processes shows it: what a client sends, or a server asks for."""
    return os.environ.get("HEADRACE_API_KEY") or None


def _section(settings: type) -> str:
    return settings.__name__.removesuffix("Settings").lower()


def _bare(kind: Any) -> Any:
    """The type without `| None`."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:  # `NewType | None` is a Union at run time
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _show(kind: Any, value: Any) -> str:
    return format_bytes(value) if kind is Bytes else str(value)


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", Bytes: "SIZE", Path: "PATH"}.get(kind, "TEXT")


def _complaining(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the message of ArgumentTypeError, and only of that."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _text(value: Any) -> str:
    """A TOML value as a flag or an environment variable would say it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _parse(kind: Any, text: str, source: str) -> Any:
    try:
        return _PARSERS[kind](text)
    except ValueError as error:
        raise BadSetting(f"{source}: {error}") from error


def _check_choice(field: dataclasses.Field[Any], value: Any) -> None:
    choices = field.metadata["choices"]
    if choices and value is not None and value not in choices:
        raise BadSetting(f"{field.name} is {value!r}; choose one of {', '.join(choices)}")
