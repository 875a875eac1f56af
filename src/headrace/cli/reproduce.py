"""`headrace reproduce`: published claims, run again. Prints what was claimed, in which setting it is asked here, what
came of it, and why the two may differ; a claim that does not hold is printed as not reproduced.

Examples:
  headrace reproduce                            # what there is
  headrace reproduce sarathi-chat-strict
  headrace reproduce past-future-balanced vtc-bound
  headrace reproduce all --markdown docs/claims.md
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.core import clock
from headrace.core.config import BadSetting
from headrace.core.types import HeadraceError

if TYPE_CHECKING:
    from headrace.sim.claims.claim import Claim


class UnknownClaim(HeadraceError):
    """There is no claim of that name."""


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "reproduce", help="run published claims again", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims to run, or all; none lists them")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write what came of them to this file")
    parser.add_argument("--processes", type=int, metavar="N", help="processor cores to use (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.sim.claims import CLAIMS, NOT_YET, told

    if not args.names:
        print("\n".join(map(told.line, CLAIMS.values())))
        return 0
    if args.markdown and not args.markdown.parent.is_dir():  # said before minutes of simulating, not after
        raise BadSetting(f"cannot write {args.markdown}: there is no folder {args.markdown.parent}")
    claims = chosen(args.names)
    begun_s = clock.perf()
    values = _obtained(claims, args.processes or os.cpu_count() or 1)
    print(f"{len(claims)} claims in {clock.perf() - begun_s:.0f} s: {told.summary(claims, values)}.")
    if args.markdown:
        _write(args.markdown, told.page(claims, values, NOT_YET))
    return 0


def chosen(names: Sequence[str]) -> list[Claim]:
    """In the order of the list; raises UnknownClaim with the nearest names."""
    from headrace.sim.claims import CLAIMS

    for name in names:
        if name != "all" and name not in CLAIMS:
            near = difflib.get_close_matches(name, CLAIMS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "`headrace reproduce` lists them."
            raise UnknownClaim(f"there is no claim named {name!r}; {hint}")
    return [claim for claim in CLAIMS.values() if "all" in names or claim.name in names]


def obtained(name: bytes) -> bytes:
    """[what a claim's numbers come to, seconds it took], from bytes to bytes for another process."""
    from headrace.sim.claims import CLAIMS

    begun_s = clock.perf()
    values = [float(value) for value in CLAIMS[name.decode()].obtain()]
    return msgspec.json.encode((values, clock.perf() - begun_s))


def _obtained(claims: Sequence[Claim], processes: int) -> dict[str, list[float]]:
    """What came of each, printed as it comes."""
    from headrace.sim.claims import told
    from headrace.sim.workers import forked

    values: dict[str, list[float]] = {}
    for at, encoded in forked(processes)(obtained, [claim.name.encode() for claim in claims]):
        claim = claims[at]
        values[claim.name], seconds = msgspec.json.decode(encoded, type=tuple[list[float], float])
        print(told.report(claim, values[claim.name], seconds), flush=True)
        if len(claims) > 1 and sys.stderr.isatty():
            print(f"{len(values)} of {len(claims)} claims done", file=sys.stderr)
    return values


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadSetting(f"cannot write {path}: {error}") from error
    print(f"written: {path}", file=sys.stderr)
