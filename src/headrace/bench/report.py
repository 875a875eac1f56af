"""A measured run as a value, as JSON and as text: one table of one run, one table of several side by side.

The JSON (schema 1) is flat. Where `vllm bench serve --save-result --save-detailed` has a key we use it, so either
tool's files can be compared. Seconds unless the name ends in `_ms`; times count from the start of the run.

    schema, date, model_id, endpoint_type, num_prompts, request_rate, burstiness, max_concurrency   what was asked
    settings, versions, server, seed                                           all flags but the key; who was measured
    duration, completed, failed, failures, total_input_tokens, total_output_tokens, cached_tokens, short_outputs
    request_throughput, output_throughput, total_token_throughput, request_goodput, goodput_fraction
    {mean,median,std,p90,p99,max}_{ttft,tpot,itl,max_itl,e2el,lag}_ms
    client_cpu_s                                                               processor time of the generator
    input_lens, output_lens, requested_output_lens, cached_lens, ttfts, itls, start_times, due_times, end_times, lags,
    finish_reasons, error_kinds, errors                                        one entry per request, in order sent
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from headrace.bench.client import Failure
from headrace.bench.metrics import METRICS, Record, Spread, Summary, summarise
from headrace.bench.settings import parse_slo
from headrace.core.types import HeadraceError
from headrace.draw.text import aligned, short, with_ratio

SCHEMA = 1
LABELS: Mapping[str, str] = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "max_itl": "longest ITL",
    "e2e": "end to end",
    "lag": "client lag",
}
_MAX_FILE_BYTES = 2 << 30
_STATS = {"mean": "mean", "median": "p50", "std": "std", "p90": "p90", "p99": "p99", "max": "max"}
_COLUMNS = {  # JSON key: field of Record
    "input_lens": "prompt_tokens",
    "output_lens": "output_tokens",
    "requested_output_lens": "asked_tokens",
    "cached_lens": "cached_tokens",
    "start_times": "sent_s",
    "due_times": "due_s",
    "end_times": "ended_s",
    "lags": "lag_s",
    "finish_reasons": "finish",
}


class BadReport(HeadraceError):
    """A file that is not a saved run."""


@dataclass(frozen=True, slots=True)
class Report:
    """One run: what was asked, who answered, what came of every request."""

    date: str  # UTC, ISO 8601
    model: str
    server: str  # its Server header; may be empty
    settings: Mapping[str, Any]  # BenchSettings.public()
    versions: Mapping[str, str]
    client_cpu_s: float
    records: tuple[Record, ...]

    @property
    def slo(self) -> Mapping[str, float]:
        return parse_slo(self.settings.get("slo"))

    @property
    def open_loop(self) -> bool:
        return self.settings.get("rate") is not None or self.settings.get("trace") is not None

    def summary(self) -> Summary:
        return summarise(self.records, self.slo)

    def to_json(self) -> dict[str, Any]:
        """The flat form described above."""
        settings = self.settings
        return {
            "schema": SCHEMA,
            "date": self.date,
            "model_id": self.model,
            "server": self.server,
            "endpoint_type": "openai-chat" if settings["endpoint"] == "chat" else "openai",
            "num_prompts": len(self.records),
            "request_rate": settings["rate"],
            "burstiness": settings["burstiness"],
            "max_concurrency": settings["concurrency"],
            "seed": settings["seed"],
            "settings": dict(settings),
            "versions": dict(self.versions),
            "client_cpu_s": self.client_cpu_s,
            **flat(self.summary()),
            **_columns(self.records),
        }


def flat(summary: Summary) -> dict[str, Any]:
    """A summary under the keys of the JSON."""
    numbers: dict[str, Any] = {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.requests - summary.completed,
        "failures": dict(summary.failures),
        "total_input_tokens": summary.prompt_tokens,
        "total_output_tokens": summary.output_tokens,
        "cached_tokens": summary.cached_tokens,
        "short_outputs": summary.short,
        "request_throughput": summary.requests_per_s,
        "output_throughput": summary.output_tokens_per_s,
        "total_token_throughput": summary.total_tokens_per_s,
        "request_goodput": summary.goodput_per_s,
        "goodput_fraction": summary.goodput_fraction,
    }
    for metric, values in summary.spreads.items():
        name = "e2el" if metric == "e2e" else metric
        numbers |= {f"{stat}_{name}_ms": _ms(values, field) for stat, field in _STATS.items()}
    return numbers


def save(report: Report, path: Path) -> None:
    """Write the JSON. Raises BadReport when the file cannot be written."""
    write_text(path, json.dumps(report.to_json(), separators=(",", ":"), allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadReport(f"cannot write {path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Any JSON object: ours or another tool's."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise BadReport(f"{path} is larger than {_MAX_FILE_BYTES >> 30} GiB; it is not a saved run")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadReport(f"cannot read the saved run {path}: {error}") from error
    if not isinstance(value, dict):
        raise BadReport(f"{path} is not a JSON object; give a file written by --save")
    return value


def from_json(value: Mapping[str, Any]) -> Report:
    """Undo `to_json`; the summary is computed again. Raises BadReport for anything else."""
    if value.get("schema") != SCHEMA:
        raise BadReport(f"not a run saved by `headrace bench --save` (schema {value.get('schema')!r}, not {SCHEMA})")
    try:
        report = Report(
            date=str(value["date"]),
            model=str(value["model_id"]),
            server=str(value["server"]),
            settings=dict(value["settings"]),
            versions=dict(value["versions"]),
            client_cpu_s=float(value["client_cpu_s"]),
            records=_records(value),
        )
        _ = describe(report), report.slo, report.settings["endpoint"], report.settings["url"]  # the settings we rely on
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadReport(f"the saved run is damaged: {type(error).__name__} {error}") from error
    return report


def table(report: Report) -> str:
    """One run for the terminal."""
    summary = report.summary()
    lines = [f"{report.model} at {report.settings['url']}" + (f" ({report.server})" if report.server else "")]
    lines += [describe(report), ""]
    lines += aligned([(f"  {name}", text) for name, text in headline(report, summary)], "<<")
    lines += ["", *aligned(_latency_rows(summary, report.open_loop), "<>>>>>"), ""]
    lines += [f"  {count} x {kind}: {_example(report, kind)}" for kind, count in summary.failures.items()]
    lines += [f"  note: {note}" for note in notes(report, summary)]
    return "\n".join(lines).rstrip() + "\n"


def describe(report: Report) -> str:
    """How the load was made, in a line."""
    s = report.settings
    count = len(report.records)
    if s["rate"] is not None:
        law = "all at once" if s["rate"] == "inf" else f"{s['rate']:g}/s, {_law(s['burstiness'])}"
        how = f"open loop, {law}"
    elif s["trace"] is not None:
        how = f"trace {Path(s['trace']).name} at {s['trace_speed']:g}x"
    else:
        return f"closed loop, {s['concurrency'] or 8} in flight, {count} requests, seed {s['seed']}"
    cap = f", at most {s['concurrency']} in flight" if s["concurrency"] else ""
    return f"{how}{cap}, {count} requests, seed {s['seed']}"


def notes(report: Report, summary: Summary) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = []
    if summary.short:
        found.append(f"{summary.short} answers had fewer tokens than asked for")
    lag = summary.spreads["lag"]
    if report.open_loop and lag and lag.p99 > 0.05:
        found.append(f"the generator fell behind by up to {lag.max * 1e3:.0f} ms; latencies include that")
    if summary.duration_s and report.client_cpu_s / summary.duration_s > 0.9:
        found.append("the generator used a whole core: the server may be faster than this shows")
    return found


def compare(named: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Saved runs side by side, each with its ratio to the first. Takes flat JSON of ours or of `vllm bench serve`."""
    rows: list[tuple[str, ...]] = [("", *(name for name, _ in named))]
    for label, key in compared_keys():
        values = [number(value.get(key)) for _, value in named]
        if any(value is not None for value in values):
            rows.append((label, *(with_ratio(value, values[0], i == 0) for i, value in enumerate(values))))
    return "\n".join(aligned(rows, "<" + ">" * len(named))) + "\n"


def compared_keys() -> list[tuple[str, str]]:
    """(label, JSON key) of the rows of a comparison."""
    rows = [
        ("requests completed", "completed"),
        ("requests failed", "failed"),
        ("duration s", "duration"),
        ("requests/s", "request_throughput"),
        ("output tokens/s", "output_throughput"),
        ("total tokens/s", "total_token_throughput"),
        ("goodput requests/s", "request_goodput"),
        ("cached prompt tokens", "cached_tokens"),
    ]
    for metric in METRICS:
        name = "e2el" if metric == "e2e" else metric
        rows += [(f"{LABELS[metric]} {stat} ms", f"{stat}_{name}_ms") for stat in ("mean", "median", "p90", "p99")]
    return rows


def number(value: Any) -> float | None:
    """A finite JSON number, or None."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def headline(report: Report, summary: Summary) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{summary.completed:,} answered, {summary.requests - summary.completed:,} failed"),
        ("duration", f"{summary.duration_s:.2f} s"),
        ("requests/s", short(summary.requests_per_s)),
        ("output tokens", f"{summary.output_tokens:,} ({short(summary.output_tokens_per_s)}/s)"),
        ("prompt tokens", f"{summary.prompt_tokens:,}{_cached(summary)}"),
        ("total tokens/s", short(summary.total_tokens_per_s)),
    ]
    if summary.good is not None and summary.goodput_per_s is not None:
        share = 100 * (summary.goodput_fraction or 0)
        kept = f"{short(summary.goodput_per_s)} requests/s, {share:.1f} % of all"
        rows.append(("goodput", f"{kept} ({promises(report)})"))
    if summary.duration_s:
        rows.append(("generator", f"{100 * report.client_cpu_s / summary.duration_s:.0f} % of a core"))
    return rows


def _latency_rows(summary: Summary, with_lag: bool) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("  milliseconds", "mean", "p50", "p90", "p99", "max")]
    for metric in (*METRICS, *(("lag",) if with_lag else ())):
        values = summary.spreads[metric]
        cells = [_cell(_ms(values, field)) for field in ("mean", "p50", "p90", "p99", "max")]
        rows.append((f"  {LABELS[metric]}", *cells))
    return rows


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 1e4 else f"{value:,.0f}"


def _law(burstiness: float) -> str:
    return "Poisson" if burstiness == 1 else f"Gamma of shape {burstiness:g}"


def promises(report: Report) -> str:
    return ", ".join(f"{LABELS[name]} <= {seconds * 1e3:g} ms" for name, seconds in report.slo.items())


def _cached(summary: Summary) -> str:
    if summary.cached_tokens is None or not summary.prompt_tokens:
        return ""
    return f", {summary.cached_tokens:,} cached ({100 * summary.cached_tokens / summary.prompt_tokens:.0f} %)"


def _example(report: Report, kind: str) -> str:
    return next(r.failure.message for r in report.records if r.failure and r.failure.kind == kind)


def _ms(values: Spread | None, field: str) -> float | None:
    return None if values is None else 1e3 * float(getattr(values, field))


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {key: [getattr(r, name) for r in records] for key, name in _COLUMNS.items()}
    columns["ttfts"] = [round(r.ttft_s, 6) if r.token_times_s else None for r in records]
    columns["itls"] = [[round(gap, 6) for gap in r.itl_s] for r in records]
    columns["error_kinds"] = [r.failure.kind if r.failure else "" for r in records]
    columns["errors"] = [r.failure.message if r.failure else "" for r in records]
    return columns


def _records(value: Mapping[str, Any]) -> tuple[Record, ...]:
    keys = [*_COLUMNS, "ttfts", "itls", "error_kinds", "errors"]
    rows = zip(*(value[key] for key in keys), strict=True)
    return tuple(_record(index, dict(zip(keys, row, strict=True))) for index, row in enumerate(rows))


def _record(index: int, row: Mapping[str, Any]) -> Record:
    plain = {name: row[key] for key, name in _COLUMNS.items()}
    if not all(_fits(kind, plain[name]) for name, kind in _KINDS.items()):
        raise ValueError(f"request {index} has a value of the wrong type")
    gaps = [] if row["ttfts"] is None else [float(row["ttfts"]), *map(float, row["itls"])]
    times = tuple(round(at_s, 6) for at_s in accumulate(gaps, initial=plain["due_s"]))[1:]
    failure = Failure(str(row["error_kinds"]), str(row["errors"])) if row["error_kinds"] else None
    return Record(index=index, token_times_s=times, failure=failure, **plain)


_KINDS = {field.name: str(field.type) for field in fields(Record) if field.name in _COLUMNS.values()}


def _fits(kind: str, value: Any) -> bool:
    if value is None:
        return kind.endswith("None")
    if kind.startswith("str"):
        return isinstance(value, str)
    return number(value) is not None and (kind == "float" or isinstance(value, int))
