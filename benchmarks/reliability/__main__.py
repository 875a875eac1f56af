"""The reliability table: runs named checks, one after the other, and prints what was promised and what came out.

    PYTHONPATH=benchmarks python -m reliability                # all of them, with smollm2
    PYTHONPATH=benchmarks python -m reliability R2 R5 --short  # two of them, with a tiny model, as in CI

Every check starts its own servers, as a user would. Exits with 1 if one of them does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import sys
import tempfile
import traceback
from pathlib import Path

from reliability.check import Check, Found, Setting
from reliability.checks import CHECKS
from reliability.running import tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="ID", help=f"some of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="a tiny model and few repeats, for CI")
    parser.add_argument("--model", help="as for headrace serve (default: smollm2, or with --short a tiny one)")
    parser.add_argument("--engine", choices=("process", "thread"), help="as for headrace serve")
    args = parser.parse_args()
    unknown = [name for name in args.checks if name not in CHECKS]
    if unknown:
        parser.error(f"there is no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or (str(tiny_model(Path(folder) / "tiny")) if args.short else "smollm2")
        setting = Setting(args.short, model, Path(folder), ("--engine", args.engine) if args.engine else ())
        return asyncio.run(table(args.checks or list(CHECKS), setting))


async def table(names: list[str], setting: Setting) -> int:
    """Print a row for each as it comes. Returns the exit status."""
    print("| id | goal | ours | held |\n|---|---|---|---|", flush=True)
    held = []
    for name in names:
        found = await run(CHECKS[name], setting)
        held.append(found.held)
        print(f"| {name} | {goal(CHECKS[name])} | {found.ours} | {'yes' if found.held else '**no**'} |", flush=True)
    return 0 if all(held) else 1


async def run(check: Check, setting: Setting) -> Found:
    """A check that breaks has not held."""
    try:
        return await check(setting)
    except Exception as error:
        traceback.print_exc()
        return Found(f"the check broke: {type(error).__name__}: {error}".replace("\n", " ")[:300], False)


def goal(check: Check) -> str:
    """What a check's docstring says."""
    return " ".join((inspect.getdoc(check) or "").split())


if __name__ == "__main__":
    sys.exit(main())
