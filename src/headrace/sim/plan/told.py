"""What a search for plans came to: words a manager can read, tables, a page, JSON, and a plan file. Decides nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from xml.etree.ElementTree import SubElement

from headrace.core.config import EngineSettings
from headrace.draw import page
from headrace.draw.text import aligned, short, three
from headrace.sim.plan.search import Found, Judged
from headrace.sim.plan.space import Plan, memory
from headrace.sim.settings import SimulateSettings
from headrace.workload.settings import WorkloadSettings

MOST_ROWS = 12
HEADS = ["plan", "format", "devices", "$/h", "$/M tokens", "p99 TTFT s", "p99 TPOT ms", "mean s", "J/token", "kept"]
REASONS = {
    "weights do not fit": "its weights are larger than the memory that may be used",
    "too little KV memory": "the longest request would not fit beside the weights",
    "cannot be cut so": "heads, experts or layers cannot be divided that way",
    "no units for the format": "the device cannot multiply that format",
    "first tokens too late": "even a prompt that is alone takes too long",
    "tokens too slow": "even a request that is alone waits too long for its tokens",
    "too few devices for the traffic": "requests come faster than it can serve them",
}


def told(found: Found, show_work: bool = False) -> str:
    """For the terminal."""
    lines = [*headline(found), "", *aligned(rows(found), "<<" + ">" * (len(HEADS) - 2)), "", *rejections(found), ""]
    return "\n".join([*lines, *sure(found), *(work(found) if show_work else [])]) + "\n"


def headline(found: Found) -> list[str]:
    """The recommendation first."""
    need, best = found.demand, found.best
    when = "at once" if found.objective == "throughput" else f"{need.rate:.3g}/s"
    what = f"{need.requests:,} requests, {when}, {need.prompt_tokens:,.0f} + {need.output_tokens:,.0f} tokens each"
    if best is None:
        return [
            f"NO PLAN keeps the promises for {what}.",
            "Try more or larger devices, other --formats, or a looser --slo; the reasons are below.",
        ]
    one, outcome = best.plan, best.outcome
    cost = "" if one.cost is None else f", ${one.cost:,.2f} an hour"
    cost += "" if best.usd_per_mtok is None else f", ${best.usd_per_mtok:,.2f} per million output tokens"
    kept = "" if outcome.kept is None else f" {outcome.kept:.2%} of the requests keep every promise."
    return [
        f"RECOMMENDED for {found.objective}: {one.layout} in {one.formats} on {one.all_devices} {_device(best)}{cost}.",
        f"  {what}.{kept}",
        f"  p99 of the first token {outcome.ttft_p99_s:.2f} s, of a later one {1e3 * outcome.tpot_p99_s:.0f} ms; "
        f"{short(three(outcome.output_per_s))} tokens/s; devices busy {outcome.busy:.0%} of the time.",
    ]


def rows(found: Found) -> list[list[str]]:
    """The front, best first, then what else holds."""
    front = found.front
    rest = [one for one in found.holding if one not in front]
    return [HEADS, *(_row(one, one in front) for one in [*front, *rest][:MOST_ROWS])]


def _row(one: Judged, best: bool) -> list[str]:
    plan, outcome = one.plan, one.outcome
    return [
        f"{'*' if best else ' '} {plan.layout}",
        plan.formats,
        f"{plan.all_devices} {_device(one)}",
        "-" if plan.cost is None else f"{plan.cost:,.2f}",
        "-" if one.usd_per_mtok is None else f"{one.usd_per_mtok:,.2f}",
        f"{outcome.ttft_p99_s:.2f}",
        f"{1e3 * outcome.tpot_p99_s:.1f}",
        f"{outcome.e2e_s:.2f}",
        f"{outcome.joules_per_token:.2f}" if outcome.joules_per_token else "-",
        "-" if outcome.kept is None else f"{outcome.kept:.2%}",
    ]


def _device(one: Judged) -> str:
    return one.plan.simulate.hardware.split("@")[0].split("x")[-1]


def rejections(found: Found) -> list[str]:
    """Every kind of reason, how often, and the plan that came closest to an example."""
    lines = [f"  * is not beaten by another plan in cost, latency and energy at once. Of {found.size:,} layouts:"]
    kinds = Counter(one.kind for one in found.refused)
    for kind, count in kinds.most_common():
        example = next(one for one in found.refused if one.kind == kind)
        lines.append(f"  {count:4} refused: {kind} ({REASONS[kind]}); {_example(example.plan)}: {example.reason}")
    missed = [one for one in found.judged if not one.holds]
    if missed:
        worst = max(missed, key=lambda one: one.outcome.kept or 0.0)
        kept = worst.outcome.kept or 0.0
        lines.append(
            f"  {len(missed):4} simulated and missed promises; closest {_example(worst.plan)}: {kept:.1%} kept"
        )
    lines.append(f"  {found.beaten:4} not simulated to the end: they cannot be better in any way than one that was")
    if found.untried:
        lines.append(f"  {found.untried:4} not tried: --simulations is spent; the answer may not be the best")
    return lines


def _example(plan: Plan) -> str:
    return f"{plan.layout} in {plan.formats}"


def sure(found: Found) -> list[str]:
    """What the answer rests on, and how it moves."""
    lines = [
        "  How sure: memory follows from the model's shape. Peaks, bandwidths and prices are catalogue numbers; what",
        "  kernels reach of them is assumed. Nothing was measured there. Formats below bf16 change answers.",
    ]
    for swing in found.swings:
        kept = "" if swing.outcome.kept is None else f"{swing.outcome.kept:.2%} kept"
        broken = " in its first requests" if not swing.outcome.whole else ""
        lines.append(f"    {swing.of}: {'still holds' if swing.holds else 'NO LONGER HOLDS'}, {kept}{broken}")
    return lines


def work(found: Found) -> list[str]:
    """The formulas, with the numbers of the recommended plan."""
    lines = [
        "  Work:",
        "    bytes of weights on the fullest device = its layers' weights x bytes of the format / devices sharing them",
        "    tokens of KV = (use x memory - weights) / bytes of a token on a device x copies of the attention",
        "    not simulated: a request alone is late, or requests/s > rows / (output x step of full rows)",
        "    step = sum over operators of max(FLOPs / peak, bytes / bandwidth) + collectives + launches + host",
    ]
    if found.best is not None:
        weights, tokens = memory(found.best.plan)
        price, per_s = found.best.plan.cost, found.best.outcome.output_per_s
        lines.append(
            f"    {found.best.plan.layout}: {weights / 1e9:.2f} GB of weights a device, {tokens:,} tokens of KV"
        )
        if price is not None and found.best.usd_per_mtok is not None:
            mtok = found.best.usd_per_mtok
            lines.append(f"    $/M tokens = {price:,.2f} / 3600 / {per_s:,.1f} tokens/s x 10^6 = {mtok:,.2f}")
    return lines


# -- for programs and browsers -----------------------------------------------------------------------------------------


def as_json(found: Found) -> str:
    """All of it."""
    return (
        json.dumps(
            {
                "objective": found.objective,
                "demand": {k: v for k, v in asdict(found.demand).items() if k != "pairs"},
                "space": found.size,
                "recommended": _one(found.best) if found.best else None,
                "front": [_one(one) for one in found.front],
                "simulated": [_one(one) for one in found.judged],
                "refused": [
                    {"plan": _settings(one.plan.simulate), "kind": one.kind, "reason": one.reason}
                    for one in found.refused
                ],
                "beaten": found.beaten,
                "untried": found.untried,
                "ten_percent_off": [
                    {"of": swing.of, "holds": swing.holds, "kept": swing.outcome.kept} for swing in found.swings
                ],
            },
            indent=2,
            default=str,
        )
        + "\n"
    )


def _one(one: Judged) -> dict[str, object]:
    weights, kv = memory(one.plan)
    return {
        "plan": _settings(one.plan.simulate),
        "layout": one.plan.layout,
        "devices": one.plan.all_devices,
        "usd_per_hour": one.plan.cost,
        "usd_per_million_output_tokens": one.usd_per_mtok,
        "weight_bytes_per_device": weights,
        "kv_tokens": kv,
        "holds": one.holds,
        **asdict(one.outcome),
    }


def _settings(simulate: SimulateSettings) -> dict[str, object]:
    usual = SimulateSettings()
    values = {field.name: getattr(simulate, field.name) for field in fields(simulate)}
    return {name: value for name, value in values.items() if value != getattr(usual, name) or name == "model"}


def html(found: Found) -> str:
    """A page that needs nothing else."""
    root, main = page.document(f"Plan for {found.scenario.simulate.model}")
    SubElement(main, "h1").text = f"Plan for {found.scenario.simulate.model}"
    for line in headline(found):
        SubElement(main, "p", {"class": "run"}).text = line.strip()
    place = page.section(main, "Plans that keep the promises", "Those with * are not beaten in every way by another.")
    page.table(place, rows(found))
    place = page.section(main, "What was turned down, and why", f"{found.size:,} layouts were looked at.")
    page.table(place, [["reason"], *([line.strip()] for line in rejections(found)[1:])], "pairs")
    place = page.section(main, "How sure is this?", "What the answer rests on, and what if it is 10 % off.")
    page.table(place, [[""], *([line.strip()] for line in sure(found))], "pairs")
    details = SubElement(main, "details", {"class": "card wide"})
    SubElement(details, "summary").text = "The plan file"
    SubElement(details, "pre").text = plan_file(found) if found.best else "none"
    return page.text_of(root)


def plan_file(found: Found) -> str:
    """TOML for `headrace simulate --plan` and `headrace serve --plan`: the settings those commands read."""
    assert found.best is not None
    simulate = found.best.plan.simulate
    lines = [f"# {line.strip()}" for line in ["Written by `headrace plan`.", *headline(found)]]
    lines += _section("simulate", simulate, SimulateSettings(), ("model", "hardware", "replicas"))
    lines += _section("engine", found.scenario.engine, EngineSettings(), ())
    parts = found.scenario.traffic
    for part in parts:
        name = "workload" if len(parts) == 1 else f"workload.{json.dumps(part.tenant)}"
        lines += _section(name, part, WorkloadSettings(), ("lengths",))
    return "\n".join(lines) + "\n"


def _section(name: str, settings: object, usual: object, always: Sequence[str]) -> list[str]:
    values = [(one.name, getattr(settings, one.name)) for one in fields(settings)]  # type: ignore[arg-type]
    told = [
        f"{key} = {_toml(value)}"
        for key, value in values
        if value is not None and (key in always or value != getattr(usual, key))
    ]
    return ["", f"[{name}]", *told]


def _toml(value: object) -> str:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False)
