"""`headrace bench roofline MODEL`: how fast could this machine run the model, how fast does it, what is lost to what?

First the machine: how fast it reads memory, and how fast it multiplies in each precision. From that and the model's
numbers follows the least time of a step, by the formulas that `headrace simulate` uses: every operator takes as long as
its multiplications or its bytes, whichever is longer. Then steps of the real executor are measured and taken apart.

How to read it:
  bound by memory     more requests side by side cost little: the weights are read once for all of them
  bound by compute    only cheaper arithmetic (a narrower weight format) raises the limit
  layers              matrix products and norms: the kernels, and calling them
  attention           reading the KV of the context; its limit is reading every key and value once
  head and sampling   the output matrix, and drawing a token from its logits
  preparing the step  from a plan to the first layer
  between steps       the scheduler, and streams that get their tokens

Run it on an idle machine. Examples:
  headrace bench roofline smollm2
  headrace bench roofline ./my-model.gguf --dtype bf16 --requests 1,16,256 --contexts 512,4096 --html roofline.html
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.assemble import Phases, add_model, open_model, show, token_budget
from headrace.cli.files import check_writable, write
from headrace.core import clock, config
from headrace.core.config import BadSetting, DeviceSettings, EngineSettings

if TYPE_CHECKING:
    from headrace.device.load import Loaded
    from headrace.device.reference.speed import Speed
    from headrace.sim.roofline.limits import Stored
    from headrace.sim.roofline.report import Roofline

ROWS, CONTEXTS, PROMPTS, ROUNDS = "1,8,32,64", "128,1024", "128,1024", 5
_MOST_ROWS, _MOST_TOKENS = 1024, 1 << 20


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "roofline", help="what is the limit, and what is reached?", description=__doc__, formatter_class=Formatter
    )
    group = parser.add_argument_group("roofline")
    group.add_argument("--requests", default=ROWS, metavar="N,...", help=f"side by side (default: {ROWS})")
    group.add_argument("--contexts", default=CONTEXTS, metavar="N,...", help=f"tokens of each (default: {CONTEXTS})")
    group.add_argument("--prompts", default=PROMPTS, metavar="N,...", help=f"lengths to prefill (default: {PROMPTS})")
    group.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"(default: {ROUNDS})")
    group.add_argument("--save", type=Path, metavar="FILE", help="write all numbers to this JSON file")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page with plots")
    add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.device.reference import speed
    from headrace.sim.roofline.page import page
    from headrace.sim.roofline.report import table, to_json

    rows, contexts, prompts = (
        numbers(f"--{name}", getattr(args, name), most)
        for name, most in (("requests", _MOST_ROWS), ("contexts", _MOST_TOKENS), ("prompts", _MOST_TOKENS))
    )
    if not 1 <= args.rounds <= 1000:
        raise BadSetting(f"--rounds is {args.rounds}; it must be between 1 and 1000")
    check_writable(args.save, args.html)
    phase = Phases()
    toml = config.read_toml(args.config)
    peaks = speed.measure(config.load(DeviceSettings, args, toml), phase)
    engine, device = config.load(EngineSettings, args, toml), config.load(DeviceSettings, args, toml)
    found = _measured(args, engine, device, peaks, rows, contexts, prompts, phase)
    print(table(found), end="")
    write(args.save, lambda: json.dumps(to_json(found), indent=1) + "\n")
    write(args.html, lambda: page(found))
    return 0


def numbers(flag: str, text: str, most: int) -> list[int]:
    """'1,8,32' as numbers, smallest first. Raises BadSetting."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= most for part in parts):
        raise BadSetting(f"{flag} {text!r} is not a list of numbers from 1 to {most}, such as 1,8,32")
    return sorted(set(map(int, parts)))


def _measured(
    args: argparse.Namespace, engine: EngineSettings, device: DeviceSettings, peaks: Speed,
    rows: list[int], contexts: list[int], prompts: list[int], phase: Phases,
) -> Roofline:  # fmt: skip
    """Load the model, measure its steps, and put them beside their limits."""
    from headrace.core.facts import MOST_STEP_TOKENS
    from headrace.device.load import load
    from headrace.sim.roofline import limits
    from headrace.sim.roofline.report import Prefill, Roofline, joined

    checkpoint = open_model(args.model, phase)
    loaded = load(checkpoint, device, engine.block_tokens, max(engine.max_running, *rows), phase)
    phase.done()
    stored, shape = stored_of(loaded), loaded.executor.shape
    chip = limits.machine(peaks.device, peaks.memory_bytes, peaks.memory_bytes_per_s, peaks.flops_per_s)
    model = limits.Limits(shape, chip, stored)
    points = [(count, context) for context in contexts for count in rows]
    asked = [tokens for tokens in prompts if tokens <= MOST_STEP_TOKENS]
    reached, seconds = clock.run(_steps(loaded, engine, points, asked, args.rounds))
    size = engine.block_tokens
    decodes = [model.decode(count, context // size * size) for count, context in points]
    return Roofline(
        model=checkpoint.name if Path(args.model).exists() else args.model,
        threads=peaks.threads,
        device=chip,
        cache_bytes_per_s=peaks.cache_bytes_per_s,
        stored=stored,
        decodes=joined(decodes, reached),
        prefills=tuple(Prefill(model.prefill(tokens), seconds.get(tokens)) for tokens in prompts),
    )


async def _steps(
    loaded: Loaded, settings: EngineSettings, points: list[tuple[int, int]], prompts: list[int], rounds: int
) -> Any:
    from headrace.sim.roofline import parts

    try:
        budget = token_budget(settings, loaded.steps)
        return await parts.measure(loaded.executor, settings, budget, points, prompts, rounds, show)
    finally:
        await loaded.executor.close()


def stored_of(loaded: Loaded) -> Stored:
    """What a step of the loaded model reads."""
    from headrace.sim.roofline.limits import Stored

    memory = loaded.memory
    return Stored(
        weights=loaded.dtype,
        weight_bytes=loaded.read_bytes,
        kv=loaded.kv,
        kv_bytes_per_token=memory.block_bytes / memory.block_tokens,
    )
