"""`headrace bench`: load any OpenAI-compatible server and measure it. Two more questions have commands of their own:

  roofline   how fast could this machine run a model, how fast does it, what is lost to what?
  quality    what does each format of weights and KV cost in quality?

Examples:
  headrace bench roofline smollm2
  headrace bench quality smollm2
  headrace bench --concurrency 32 --requests 64 --input 128 --output 128 --slo ttft=2.0,tpot=0.3 --html out.html
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headrace.bench.settings import BenchSettings
from headrace.cli import quality, roofline
from headrace.core import config


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "bench", help="measure any server, this machine, a format", description=__doc__, formatter_class=Formatter
    )
    more = parser.add_subparsers(title="questions", metavar="QUESTION")
    roofline.add(more)
    quality.add(more)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with a section [bench]")
    config.add_flags(parser, BenchSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.bench.run import main

    return main(config.load(BenchSettings, args, config.read_toml(args.config)))
