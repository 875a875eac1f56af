"""`headrace calibrate MODEL`: measure what steps cost on this machine, so that `headrace simulate` can tell what it
would do under any traffic.

Example:
  headrace calibrate smollm2 --out smollm2.json
  headrace calibrate ./my-model.gguf --kv-memory 2GiB --rows 64 --context 2048 --out mine.json
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import headrace
from headrace.cli.assemble import Phases, add_model, open_model, show, token_budget
from headrace.core import clock, config
from headrace.core.config import BadSetting, DeviceSettings, EngineSettings

if TYPE_CHECKING:
    from headrace.device.load import Loaded
    from headrace.sim.calibration import Calibration, Origin
    from headrace.sim.measure import Prober, Session, Step

ROWS, CONTEXT, ROUNDS = 32, 512, 5
QUICK = (4, 64, 1)
_KV_SHARE = 0.7  # of the blocks that documents may fill: decoders need some of their own


@dataclass(frozen=True, slots=True)
class Extent:
    """How far and how often to measure."""

    rows: int  # most requests side by side
    context: int  # longest context in tokens
    rounds: int  # every session is measured so often, in another order each time


@dataclass(frozen=True, slots=True)
class Live:
    """An engine's parts, to be put together anew for every measurement."""

    loaded: Loaded
    settings: EngineSettings
    token_budget: int
    origin: Origin


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "calibrate", help="measure this machine for the simulator", description=__doc__, formatter_class=Formatter
    )
    add_model(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument("--out", type=Path, metavar="FILE", help="where to store it (default: MODEL.calibration.json)")
    group.add_argument("--rows", type=int, metavar="N", help=f"most requests side by side (default: {ROWS})")
    group.add_argument("--context", type=int, metavar="N", help=f"longest context measured (default: {CONTEXT})")
    group.add_argument("--rounds", type=int, metavar="N", help=f"how often each step is measured (default: {ROUNDS})")
    group.add_argument("--quick", action="store_true", help="few and small steps, once: seconds, and a rough result")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.sim.calibration import store

    extent = extent_of(args)
    phase = Phases()
    print(f"headrace calibrate {args.model}", file=sys.stderr)
    live = open_live(args, phase)
    calibration = clock.run(_calibrate(live, extent))
    out = args.out or Path(f"{live.origin.model.replace('/', '--')}.calibration.json")
    store(calibration, out)
    print(report(calibration))
    print(f"stored in {out} after {phase.elapsed_s:.0f} s", file=sys.stderr)
    return 0


def extent_of(args: argparse.Namespace) -> Extent:
    """Raises BadSetting for what cannot be measured."""
    default = QUICK if args.quick else (ROWS, CONTEXT, ROUNDS)
    given = (args.rows, args.context, args.rounds)
    extent = Extent(*(least if one is None else one for one, least in zip(given, default, strict=True)))
    if not (1 <= extent.rows <= 1024 and 32 <= extent.context <= 1 << 20 and 1 <= extent.rounds <= 100):
        raise BadSetting("--rows must be 1 to 1024, --context 32 to 1048576 and --rounds 1 to 100")
    return extent


def open_live(args: argparse.Namespace, phase: Phases) -> Live:
    """Load what the command line names, as `serve` would."""
    from headrace.device.load import load
    from headrace.sim.calibration import Origin

    toml = config.read_toml(args.config)
    settings, device = config.load(EngineSettings, args, toml), config.load(DeviceSettings, args, toml)
    checkpoint = open_model(args.model, phase)
    loaded = load(checkpoint, device, settings.block_tokens, settings.max_running, phase)
    phase.done()
    origin = Origin(
        model=checkpoint.name if Path(args.model).exists() else args.model,
        shape=loaded.executor.shape,
        dtype=loaded.dtype,
        device=loaded.device,
        threads=device.threads or os.cpu_count() or 1,
        cpu=_cpu(),
        versions=_versions(),
        at=datetime.fromtimestamp(clock.wall(), UTC).isoformat(timespec="seconds"),
    )
    return Live(loaded, settings, token_budget(settings, loaded.steps), origin)


async def _calibrate(live: Live, extent: Extent) -> Calibration:
    try:
        return await calibrate(live, extent)
    finally:
        await live.loaded.executor.close()


async def calibrate(live: Live, extent: Extent) -> Calibration:
    """Measure, fit and cross-validate."""
    return fitted(live, await measure(live, extent))


async def measure(live: Live, extent: Extent, bar: Callable[[str, float], None] | None = None) -> list[Step]:
    """Steps of every kind that the extent asks for and the engine can hold."""
    from headrace.sim.measure import documents, probing

    bar = bar or show
    extent, sessions = _fitting(live, extent)
    async with probing(live.loaded.executor, live.settings, live.token_budget) as prober:
        lengths = documents(sessions)
        await prober.prepare(lengths, lambda done: bar("fill the KV that steps read", done / len(lengths)))
        await _measure(prober, sessions, extent.rounds, bar)
    return [step for step in prober.watch.steps if step.label is not None]


def fitted(live: Live, steps: Sequence[Step]) -> Calibration:
    """What measured steps tell about all others."""
    from headrace.sim.calibration import FORMAT, Calibration, Point, fit_best
    from headrace.sim.measure import grouped, host_seconds

    executor, measured = live.loaded.executor, grouped(steps)
    row_sizes = executor.row_sizes
    best, errors = fit_best([one.sample for one in measured], row_sizes)
    return Calibration(
        format=FORMAT,
        origin=live.origin,
        capacity=executor.capacity,
        token_budget=live.token_budget,
        settings=live.settings,
        row_sizes=row_sizes,
        host_s=host_seconds(steps),
        points=tuple(map(Point.of, measured)),
        fitted=best,
        errors=errors,
    )


def _fitting(live: Live, extent: Extent) -> tuple[Extent, list[Session]]:
    """As much of what was asked for as the engine can hold, and the sessions."""
    from headrace.sim.measure import design

    capacity = live.loaded.executor.capacity
    rows = min(extent.rows, live.settings.max_running)
    room = int(capacity.blocks * capacity.block_tokens * _KV_SHARE)
    budget = min(live.token_budget, capacity.max_context_tokens // 4)
    context = min(extent.context, room // (rows + 4), capacity.max_context_tokens // 2)
    context -= context % capacity.block_tokens
    if context < capacity.block_tokens:
        raise BadSetting(f"too little KV memory to measure {rows} requests; give more --kv-memory or fewer --rows")
    return replace(extent, rows=rows, context=context), design(rows, context, budget)


async def _measure(prober: Prober, sessions: list[Session], rounds: int, bar: Callable[[str, float], None]) -> None:
    """Every session in every round, in a new order each time: what drifts hits them all alike."""
    order, total = Random(0), rounds * len(sessions)
    for done in range(total):
        if done % len(sessions) == 0:
            turn = order.sample(range(len(sessions)), len(sessions))
        bar("measure steps", done / total)
        number = turn[done % len(sessions)]
        await prober.session(sessions[number], number)
    bar("measure steps", 1.0)


def report(calibration: Calibration) -> str:
    """What was found, as a person reads it."""
    from headrace.sim.cost.tiled import Sizes

    origin, fitted = calibration.origin, calibration.fitted
    repeats = sum(point.repeats for point in calibration.points)
    spread = sorted(point.spread for point in calibration.points)[len(calibration.points) // 2]
    lines = [
        f"{origin.model}, {origin.dtype} on {origin.device} ({origin.cpu}, {origin.threads} threads)",
        f"  {len(calibration.points)} points from {repeats} steps, half of them within {spread:.1%} of their point",
        f"  host {1000 * calibration.host_s:.2f} ms a step, {calibration.capacity.blocks:,} blocks of "
        f"{calibration.capacity.block_tokens}, {calibration.token_budget} tokens a step at most",
        "  steps that a fit has not seen are off by      mean  median     p90   worst",
    ]
    for kind, errors in sorted(calibration.errors.items(), key=lambda item: item[1].mean):
        numbers = (errors.mean, errors.median, errors.p90, errors.worst)
        chosen = "<- stored" if kind == fitted.kind else ""
        lines.append(f"    {kind:40} {' '.join(f'{number:7.1%}' for number in numbers)}  {chosen}".rstrip())
    if fitted.kind == "tiled":
        prices = zip(Sizes(calibration.row_sizes).terms, fitted.coefficients, strict=True)
        lines.append("  " + ", ".join(f"{name} {1000 * price:.3g} ms" for name, price in prices))
    measured = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in calibration.range().items())
    return "\n".join([*lines, f"  measured range: {measured}; estimates outside it are marked"])


def _versions() -> dict[str, str]:
    from importlib.metadata import version  # 25 ms, which every command would pay for

    return {"headrace": headrace.__version__, "python": platform.python_version(), "torch": version("torch")}


def _cpu() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
