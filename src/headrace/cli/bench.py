"""`headrace bench`: load any OpenAI-compatible server and measure it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headrace.bench.settings import BenchSettings
from headrace.core import config


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "bench", help="measure any OpenAI-compatible server", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with a section [bench]")
    config.add_flags(parser, BenchSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.bench.run import main

    return main(config.load(BenchSettings, args, config.read_toml(args.config)))
