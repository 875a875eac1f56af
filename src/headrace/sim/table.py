"""What came of simulations, for the terminal: one as a table, several side by side with ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from headrace.core.config import format_bytes
from headrace.core.shape import ModelShape
from headrace.draw.text import aligned, short, three, with_ratio
from headrace.sim.cost.analytic import Analytic
from headrace.sim.run import Report, Site
from headrace.sim.scenario import Scenario, convention
from headrace.sim.sketch import Course, Sketch
from headrace.sim.stats import Totals
from headrace.sim.sweep import ROOM, Sweep, attained
from headrace.workload.settings import WorkloadSettings

LABELS: Mapping[str, str] = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "itl_s": "ITL",
    "longest_itl_s": "longest ITL",
    "e2e_s": "end to end",
    "queue_s": "in the queue",
}


def table(scenario: Scenario, site: Site, report: Report) -> str:
    """One simulation."""
    lines = [subject(scenario, site), load(scenario), ""]
    lines += aligned([(f"  {name}", value) for name, value in headline(site, report)], "<<")
    lines += ["", *aligned(_latencies(report.totals), "<>>>>>"), ""]
    lines += [f"  note: {note}" for note in notes(scenario, site, report)]
    lines.append(f"  seed {report.seed}, event log {report.digest}")
    return "\n".join(lines) + "\n"


def subject(scenario: Scenario, site: Site) -> str:
    """Who is asked."""
    settings, cost = scenario.simulate, site.cost
    tokens = site.capacity.blocks * site.capacity.block_tokens
    replicas = f"{site.replicas} replicas of " if site.replicas > 1 else ""
    if settings.calibration is not None or not isinstance(cost, Analytic):
        return f"{replicas}what was measured in {settings.calibration}: {tokens:,} tokens of KV"
    where, parallel = cost.placement, cost.placement.parallel
    cut = ", ".join(
        f"{name} {degree}"
        for name, degree in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline))
        if degree > 1
    )
    return (
        f"{replicas}{settings.model} ({_billions(where.shape)}, {settings.weights}) on {settings.hardware}"
        f"{f' ({cut})' if cut else ''}: {where.weight_bytes / 1e9:.1f} GB of weights a device, "
        f"{tokens:,} tokens of KV at {format_bytes(where.formats.kv.bytes_per_token(where.shape))} each"
    )


def load(scenario: Scenario) -> str:
    """What comes."""
    return "; ".join(map(_part, scenario.traffic)) + (
        f", {scenario.speed:g} times as fast" if scenario.speed != 1 else ""
    )


def headline(site: Site, report: Report) -> list[tuple[str, str]]:
    """(name, value) of the numbers people look for first."""
    totals, per_s = report.totals, report.totals.per_second()
    failed = {reason: count for reason, count in totals.finished.items() if reason not in ("stop", "length")}
    others = "".join(f", {count:,} {reason}" for reason, count in sorted(failed.items()))
    blocks = site.capacity.blocks * site.replicas
    rows = [
        ("requests", f"{totals.completed:,} answered, {totals.rejected:,} refused{others}"),
        ("duration", f"{totals.span_s:,.1f} s of virtual time"),
        ("requests/s", short(three(per_s["requests"]))),
        ("output tokens/s", short(three(per_s["output tokens"]))),
        ("prompt tokens/s", short(three(per_s["prompt tokens"]))),
        ("running", f"{_peak(totals.running):,.0f} at most, {_peak(totals.waiting):,.0f} waiting"),
        ("KV in use", f"{_used(site, totals):.0%} on average, {_peak(totals.used_blocks) / blocks:.0%} at most"),
        (
            "steps",
            f"{totals.steps:,} of {totals.busy_s / max(totals.steps, 1) * 1e3:.1f} ms, {_busy(site, totals):.0%} busy",
        ),
        ("step time", ", ".join(f"{term} {share:.0%}" for term, share in totals.spent.shares().items())),
    ]
    if totals.cached_tokens:
        rows.append(("prefix cache", f"{totals.cached_tokens / totals.queried_tokens:.1%} of prompt tokens found"))
    if totals.drafted_tokens:
        right = totals.accepted_tokens / totals.drafted_tokens
        rows.append(("drafts", f"{totals.drafted_tokens:,} tokens, {right:.1%} accepted"))
    if totals.preemptions:
        rows.append(("preemptions", f"{totals.preemptions:,}, {totals.lost_tokens:,} tokens lost"))
    if totals.spent.copied_bytes:
        rows.append(("host tier", f"{format_bytes(totals.spent.copied_bytes)} copied out and in, by each device"))
    if totals.spent.joules and totals.output_tokens:
        joules = totals.spent.joules / totals.output_tokens
        rows.append(("energy", f"{short(three(joules))} J per output token, in steps"))
    share = attained(totals)
    if share is not None:
        rows.append(
            ("goodput", f"{short(three(per_s['good requests']))} requests/s, {share:.2%} of all kept their SLO")
        )
    return rows


def verdict(scenario: Scenario, site: Site, report: Report, sweep: Sweep | None) -> str:
    """Does it hold, and what is the most it holds?"""
    share, needed = attained(report.totals), scenario.simulate.attain
    lines = []
    if share is not None:
        told = f"{_slo(scenario)} for {needed:.3g} of the requests"
        lines.append(f"{'HOLDS' if share >= needed else 'DOES NOT HOLD'}: {told}; {share:.4f} kept it.")
    if sweep is not None:
        lines.append(_most(site, sweep))
    return "".join(f"{line}\n" for line in lines)


def _most(site: Site, sweep: Sweep) -> str:
    low, high = sweep.points[0].rate, sweep.points[-1].rate
    if sweep.highest is None:
        return f"AT MOST less than {low:g} requests/s: even the lowest load of the sweep does not hold."
    if sweep.highest.rate == high:
        return f"AT MOST more than {high:g} requests/s: even the highest load of the sweep holds.{_plan(sweep)}"
    beyond = next(point for point in sweep.points if point.rate > sweep.highest.rate)
    edge = f"AT MOST {sweep.highest.rate:.3g} requests/s; beyond that {_limit(site, beyond.report.totals)}."
    return edge + _plan(sweep)


def _plan(sweep: Sweep) -> str:
    rate = f"less than {sweep.points[0].rate:g}" if sweep.planned_rate is None else f"{sweep.planned_rate:.3g}"
    return f" Plan for {rate}: that holds even if every step takes {ROOM:.0%} longer."


def _limit(site: Site, totals: Totals) -> str:
    """What gives out first."""
    if _peak(totals.running) >= site.replicas * site.settings.max_running:
        return f"requests wait because --max-running {site.settings.max_running} are running: try more"
    if _peak(totals.used_blocks) >= 0.95 * site.replicas * site.capacity.blocks:
        return "requests wait because the KV memory is full: try --kv fp8, or more memory"
    shares = totals.spent.shares()
    return f"steps take too long, mostly because of {max(shares, key=shares.__getitem__)}"


def notes(scenario: Scenario, site: Site, report: Report) -> list[str]:
    """What a reader should know before trusting the numbers."""
    settings, totals, found = scenario.simulate, report.totals, []
    if totals.spent.extrapolated_s:
        share = totals.spent.extrapolated_s / max(totals.spent.seconds, 1e-9)
        found.append(f"{share:.0%} of the time is in steps beyond what was measured: extrapolated, do not rely on it")
    if isinstance(site.cost, Analytic):
        found.append(_assumed(scenario))
    if _peak(totals.running) >= site.replicas * site.settings.max_running and _peak(totals.waiting):
        found.append(f"--max-running {site.settings.max_running} was reached while others waited; try more")
    count = totals.completed
    if 0 < count < 1000:
        found.append(f"a p99 of {count} requests is that of {max(1, count // 100)}; take more with --requests")
    if settings.calibration is None and totals.spent.shares()["overhead"] > 0.25:
        found.append("a quarter of the time or more is host overhead, which was assumed (--host-ms), not measured")
    return found


def _assumed(scenario: Scenario) -> str:
    settings, counted = scenario.simulate, convention(scenario.simulate)
    return (
        f"assumed, not measured ({counted.name}): kernels reach {counted.compute_share:.0%} of peak FLOP/s, "
        f"{counted.memory_share:.0%} of memory and {counted.network_share:.0%} of link bandwidth; "
        f"the host adds {settings.host_ms:g} ms a step. "
        "Published engines reach 7 to 37 % less in the median (docs/simulator.md)"
    )


def compare(named: Sequence[tuple[str, Report]]) -> str:
    """Side by side in the terminal, each with its ratio to the first."""
    return "\n".join(aligned(compared(named), "<" + ">" * len(named))) + "\n"


def compared(named: Sequence[tuple[str, Report]]) -> list[list[str]]:
    """The rows of a comparison."""
    rows = [["", *(name for name, _ in named)]]
    columns = [numbers(report.totals) for _, report in named]
    for name in columns[0]:
        values = [column[name] for column in columns]
        if any(value is not None for value in values):
            rows.append([name, *(with_ratio(value, values[0], at == 0) for at, value in enumerate(values))])
    return rows


def as_json(named: Sequence[tuple[str, Report]], sweep: Sweep | None) -> str:
    """All numbers, for a program."""
    found: dict[str, object] = {
        "simulations": [
            {"name": name, "seed": report.seed, "event_log": report.digest, **numbers(report.totals)}
            for name, report in named
        ]
    }
    if sweep is not None:
        found["highest_rate"] = sweep.highest.rate if sweep.highest else None
        found["planned_rate"] = sweep.planned_rate
        found["sweep"] = [
            {"rate": point.rate, "holds": point.holds, **numbers(point.report.totals)} for point in sweep.points
        ]
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def numbers(totals: Totals) -> dict[str, float | None]:
    """One simulation as named numbers, for comparisons and for machines. Times in milliseconds."""
    per_s = totals.per_second()
    found: dict[str, float | None] = {
        "requests completed": totals.completed,
        "requests refused": totals.rejected,
        "duration s": totals.span_s,
        **{f"{name}/s": per_s[name] for name in ("requests", "good requests", "output tokens", "prompt tokens")},
        "SLO kept": attained(totals),
        "preemptions": totals.preemptions,
        "drafted tokens": totals.drafted_tokens,
        "accepted tokens": totals.accepted_tokens,
        "cached prompt tokens": totals.cached_tokens,
        "steps": totals.steps,
        "busy s": totals.busy_s,
        "joules/output token": totals.spent.joules / totals.output_tokens if totals.output_tokens else None,
    }
    for field, label in LABELS.items():
        sketch: Sketch = getattr(totals, field)
        values = (sketch.mean, *map(sketch.quantile, (0.5, 0.9, 0.99)))
        names = (f"{label} {which} ms" for which in ("mean", "p50", "p90", "p99"))
        found |= {name: None if value is None else 1e3 * value for name, value in zip(names, values, strict=True)}
    found |= {f"{term} share": share for term, share in totals.spent.shares().items()}
    return {name: None if value is None else float(f"{value:.6g}") for name, value in found.items()}


def _latencies(totals: Totals) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("  milliseconds", "mean", "p50", "p90", "p99", "max")]
    for field, label in LABELS.items():
        sketch: Sketch = getattr(totals, field)
        if sketch.count:
            values = (sketch.mean, *map(sketch.quantile, (0.5, 0.9, 0.99)), sketch.greatest)
            rows.append((f"  {label}", *(f"{1e3 * (value or 0.0):,.1f}" for value in values)))
    return rows


def _part(part: WorkloadSettings) -> str:
    """One part of the traffic."""
    when = part.arrivals or ("at its own times" if part.trace else "poisson:1")
    what = f"trace {part.trace.name}" if part.trace and part.lengths != "pairs" else part.lengths
    more = [f"turns {part.turns}"] if part.turns else []
    more += [f"{part.shared_prefix} tokens shared"] if part.shared_prefix else []
    name = f"{part.tenant}: " if part.tenant else ""
    return f"{name}{', '.join([what, when, *more])}, seed {part.seed}"


def _slo(scenario: Scenario) -> str:
    return " and ".join(
        f"{promise.strip().replace('=', ' <= ').upper()} s" for promise in (scenario.traffic[0].slo or "").split(",")
    )


def _billions(shape: ModelShape) -> str:
    total, active = shape.weights / 1e9, shape.active_weights / 1e9
    return f"{total:.3g} B weights, {active:.3g} B active" if shape.experts else f"{total:.3g} B weights"


def _peak(course: Course) -> float:
    return max((value for _, value in course.points()), default=0.0)


def _used(site: Site, totals: Totals) -> float:
    """The average share of blocks in use during steps."""
    return totals.used_block_s / max(totals.busy_s, 1e-9) / site.capacity.blocks


def _busy(site: Site, totals: Totals) -> float:
    return totals.busy_s / max(totals.span_s * site.replicas, 1e-9)
