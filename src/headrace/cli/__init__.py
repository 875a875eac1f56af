"""The door: parses the command line, assembles the rooms and starts them. The only place that may import every room.

One file per command; each has `add(subparsers)` for its flags and `run(args)` for its work. Rooms are imported inside
`run`, so that `headrace --help` does not wait for torch; of the commands only the one that is asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import headrace
from headrace.core.types import HeadraceError

COMMANDS = (
    "serve", "keys", "run", "top", "bench", "simulate", "plan", "tune", "calibrate",
    "replay", "reproduce", "pull", "models",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `headrace`. Returns the exit status: 0 fine, 1 a command that ran found failures, 2 bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser(*words[:1]).parse_args(words)
    try:
        status: int = args.run(args)
        return status
    except HeadraceError as error:
        print(f"headrace {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser(only: str = "") -> argparse.ArgumentParser:
    """Of this command; of all of them, if there is no such command."""
    top = argparse.ArgumentParser(prog="headrace", description=headrace.__doc__, formatter_class=Formatter)
    top.add_argument("--version", action="version", version=f"headrace {headrace.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name in [only] if only in COMMANDS else COMMANDS:
        _file_of(name).add(commands)
    return top


def _file_of(name: str) -> Any:
    """Its module. Spelled out, because nothing here turns a name into code."""
    command: Any = None
    match name:
        case "serve":
            from headrace.cli import serve as command
        case "keys":
            from headrace.cli import keys as command
        case "run":
            from headrace.cli import chat as command
        case "top":
            from headrace.cli import top as command
        case "bench":
            from headrace.cli import bench as command
        case "simulate":
            from headrace.cli import simulate as command
        case "plan":
            from headrace.cli import plan as command
        case "tune":
            from headrace.cli import tune as command
        case "calibrate":
            from headrace.cli import calibrate as command
        case "replay":
            from headrace.cli import replay as command
        case "reproduce":
            from headrace.cli import reproduce as command
        case "pull":
            from headrace.cli import pull as command
        case "models":
            from headrace.cli import models as command
    return command


class Parser(argparse.ArgumentParser):
    """One of whose commands may go without saying."""

    usual: tuple[str, frozenset[str]] | None = None  # that command, and the first words that are not meant for it

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.usual and args is not None and not (args and args[0] in self.usual[1]):
            args = [self.usual[0], *args]
        return super().parse_known_args(args, namespace)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and gives the help texts a column of their own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


if __name__ == "__main__":
    sys.exit(main())
