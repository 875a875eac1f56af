"""`headrace replay FILE`: play a recorded server again, in virtual time, and compare every step plan.

Example:
  headrace serve smollm2 --record-plans plans.jsonl     # ... some traffic, then Ctrl-C
  headrace replay --check plans.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.sim.recording import Entry


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "replay", help="check that a recorded run plans the same again", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="written by `headrace serve --record-plans FILE`")
    parser.add_argument("--check", action="store_true", help="print nothing but the verdict")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.sim import recording, replay

    seen = Counter[str]()
    try:
        with args.file.open("rb") as stream:
            replayed = replay.check(_counted(recording.read(stream), seen))
    except OSError as error:
        raise recording.BadRecording(f"cannot read {args.file}: {error}") from error
    if not args.check:
        what = {"Arrive": "requests", "Abort": "aborts", "Plan": "step plans", "Failed": "failed steps"}
        print(", ".join(f"{seen[kind]:,} {name}" for kind, name in what.items()))
    if replayed.difference is not None:
        print(
            f"{len(replayed.digests):,} plans are identical, the next differs: {replayed.difference}", file=sys.stderr
        )
        return 1
    print(f"all {len(replayed.digests):,} plans are identical")
    return 0


def _counted(entries: Iterable[Entry], seen: Counter[str]) -> Iterator[Entry]:
    for entry in entries:
        seen[type(entry).__name__] += 1
        yield entry
