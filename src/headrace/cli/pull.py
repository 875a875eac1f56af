"""`headrace pull ORG/NAME`: fetch a model from a hub, so that `serve` and `run` find it by name.

Example:
  headrace pull Qwen/Qwen3-0.6B
  headrace pull unsloth/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q4_K_M.gguf
"""

from __future__ import annotations

import argparse
from typing import Any

from headrace.core import config


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser("pull", help="fetch a model", description=__doc__, formatter_class=Formatter)
    parser.add_argument("model", metavar="ORG/NAME[:FILE.gguf]", help="a repository of the hub, or one file of it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.device import sources

    path = sources.pull(args.model, config.home(), print)
    print(f"{args.model} is at {path}")
    return 0
