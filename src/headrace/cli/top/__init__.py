"""`headrace top`: what a server does now, in a terminal: its requests, its KV memory, its last steps, and why a request
takes as long as it does.

Example:
  headrace top
  headrace top --url http://10.0.0.7:8000 --once       # one frame, for scripts

Keys: arrows (or j and k) choose a request, Enter explains it, Escape goes back, q quits.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from headrace.core import config
from headrace.core.config import setting


@dataclass(frozen=True, slots=True)
class TopSettings:
    """Which server."""

    url: str = setting("http://127.0.0.1:8000", "the server's address")
    api_key: str | None = setting(None, "sent as a bearer token; better set as HEADRACE_API_KEY")
    once: bool = setting(False, "print one frame and end")


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "top", help="watch a server in a terminal", description=__doc__, formatter_class=Formatter
    )
    config.add_flags(parser, TopSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.cli.top import frame, screen
    from headrace.cli.top.source import Source

    settings = config.load(TopSettings, args)
    source = Source(settings.url, settings.api_key)
    if not settings.once and sys.stdin.isatty() and sys.stdout.isatty():
        screen.watch(source)
        return 0
    colours = sys.stdout.isatty()
    lines = frame.overview(source.now(), frame.Size(screen.columns(), None), None)
    print("\n".join(line.text(colours) for line in lines))
    return 0
