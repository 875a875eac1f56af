"""`headrace bench quality MODEL`: what does each format cost in quality?

The model is loaded in one format after the other and judges the same text with the engine that serves; each judgement
is compared with that of the reference, for which the file's own weights are expanded to fp32.

How to read it:
  perplexity  how many tokens the model hesitates between, on average; the ratio says what the format costs
  agreement   how often the likeliest next token is the same
  KL          how far the whole prediction moves, in nats: mean, and what one token in a hundred exceeds

The text that comes with Headrace is English prose of some 8,000 tokens, written for this. The ratio needs no known
text, only one that the model understands: give your own with --text. Examples:
  headrace bench quality smollm2
  headrace bench quality ./my-model.gguf --formats bf16 --text letters.txt --save quality.json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.assemble import Phases, add_model, assemble, show
from headrace.cli.files import check_writable, write
from headrace.core import clock, config
from headrace.core.config import BadSetting, DeviceSettings

if TYPE_CHECKING:
    from headrace.bench.quality import Judged, Quality
    from headrace.cli.assemble import Assembled

SCHEMA = 1
_WINDOW, _LEAST_WINDOW, _MOST_WINDOW = 512, 16, 1 << 20


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "quality", help="what does a format cost in quality?", description=__doc__, formatter_class=Formatter
    )
    group = parser.add_argument_group("quality")
    listed = ",".join(formats())
    group.add_argument("--formats", default=listed, metavar="NAME,...", help=f"to judge (default: {listed})")
    group.add_argument("--against", default="fp32", metavar="NAME", help="the reference (default: fp32)")
    group.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to judge, instead of the one that comes along"
    )
    group.add_argument("--tokens", type=int, metavar="N", help="judge only the first N of them")
    group.add_argument(
        "--window", type=int, default=_WINDOW, metavar="N", help=f"tokens of one request (default: {_WINDOW})"
    )
    group.add_argument("--save", type=Path, metavar="FILE", help="write all numbers to this JSON file")
    add_model(parser)
    parser.set_defaults(run=run)


def formats() -> dict[str, dict[str, str]]:
    """Name -> device settings of every format the device room offers: of weights, and of KV beside fp32 weights."""
    weights = {value: {"dtype": value} for value in _choices("dtype")}
    kv = {f"kv-{value}": {"dtype": "fp32", "kv_dtype": value} for value in _choices("kv_dtype") if value != "fp32"}
    return weights | kv


def _choices(setting: str) -> list[str]:
    """The formats among the values of a device setting."""
    found = next(field for field in dataclasses.fields(DeviceSettings) if field.name == setting)
    return [value for value in found.metadata["choices"] if value != "auto"]


def run(args: argparse.Namespace) -> int:
    names = chosen(args.against, *args.formats.split(","))
    if not _LEAST_WINDOW <= args.window <= _MOST_WINDOW or not (args.tokens is None or args.tokens > 1):
        raise BadSetting(f"--window must be {_LEAST_WINDOW} to {_MOST_WINDOW}, and --tokens at least 2")
    check_writable(args.save)
    judged: dict[str, Judged] = {}
    for name in names:
        judged[name] = clock.run(_judged(args, name))
    found = _compared(judged, args.against)
    print(table(args.model, args.against, found), end="")
    write(args.save, lambda: json.dumps(to_json(args.model, args.against, found), indent=1) + "\n")
    return 0


def chosen(*names: str) -> list[str]:
    """Each once, in order. Raises BadSetting."""
    known = formats()
    for name in names:
        if name not in known:
            raise BadSetting(f"there is no format named {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


async def _judged(args: argparse.Namespace, name: str) -> Judged:
    """Load the model in one format and let it judge the text."""
    from headrace.bench import quality

    told = argparse.Namespace(**vars(args) | {f"device.{key}": value for key, value in formats()[name].items()})
    toml, phase = config.read_toml(args.config), Phases()
    assembled = assemble(told, toml, phase)
    engine = asyncio.create_task(assembled.engine.run())
    try:
        prompts = await _prompts(args, assembled)
        return await quality.judge(assembled.engine, prompts, lambda share: show(f"judge the text in {name}", share))
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        await assembled.executor.close()
        assembled.text.close()


async def _prompts(args: argparse.Namespace, assembled: Assembled) -> list[tuple[int, ...]]:
    """The text in windows, each of which begins as a prompt does."""
    from headrace.bench import quality

    begin = await assembled.text.encode("")
    ids = (await assembled.text.encode(quality.text(args.text)))[len(begin) :][: args.tokens]
    size = min(args.window, assembled.engine.capacity.max_context_tokens - 1)
    return list(quality.windows(ids, size, begin))


def _compared(judged: dict[str, Judged], against: str) -> dict[str, Quality]:
    from headrace.bench import quality

    return {name: quality.compare(judged[against], one) for name, one in judged.items()}


def table(model: str, against: str, found: dict[str, Quality]) -> str:
    from headrace.draw.text import aligned

    rows = [["  format", "perplexity", f"over {against}", "agreement", "KL mean", "KL p99"]]
    for name, one in found.items():
        over = "-" if name == against else f"{one.ratio - 1:+.2%} (+- {one.ratio_error:.2%})"
        cells = (f"{one.perplexity:.3f}", over, f"{one.agreement:.2%}", f"{one.kl_mean:.5f}", f"{one.kl_p99:.4f}")
        rows.append([f"  {name}", *cells])
    tokens = next(iter(found.values())).tokens
    return "\n".join([f"{model}, {tokens:,} judged tokens", "", *aligned(rows, "<>>>>>")]) + "\n"


def to_json(model: str, against: str, found: dict[str, Quality]) -> dict[str, Any]:
    values = {name: dataclasses.asdict(one) for name, one in found.items()}
    return {"schema": SCHEMA, "model": model, "against": against, "formats": values}
