"""Requests per CPU second of this simulator and of vidur's, one after the other on the same traffic: ShareGPT lengths,
Poisson arrivals, one replica of an 8B model on one device, chunked prefill beside decodes (vidur's `sarathi`) under the
same token budget, the same blocks, and the same price of a step but for the rounding in vidur's tables.

Needs an interpreter that has vidur (`pip install vidur==0.0.26`). Vidur is run as it is best: with its native predictor
if that is faster, with its metrics and without. CPU seconds of the event loops alone: its start-up, tables and files
are left out, and ours has none.

    python benchmarks/vidur_ratio.py --vidur PYTHON [--requests 2000]
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from simulator_speed import H100_8B, SITE, STEPPING, arrivals, cpu_s

from headrace.sim.run import Site, simulate
from headrace.workload.arrival import Arrival

RATES = {"at 70 %": 24.0, "saturated": 1e6}
SIDE = Path(__file__).with_name("vidur_side.py")
CASE = {
    "max_context_tokens": SITE.capacity.max_context_tokens,
    "block_tokens": SITE.capacity.block_tokens,
    "blocks": SITE.capacity.blocks,
    "max_running": SITE.settings.max_running,
    "token_budget": SITE.token_budget,
    "step_s": H100_8B.step_s,
    "token_s": H100_8B.token_s,
    "reach_s": H100_8B.reach_s,
    "context_s": H100_8B.context_s,
}
ROW = "{:<44}{:>9}{:>10}{:>10}{:>10}{:>9}"


def write_trace(file: IO[str], traffic: Sequence[Arrival]) -> None:
    """As vidur reads it."""
    rows = csv.writer(file)
    rows.writerow(["Date", "Time", "PromptTokenCount", "CompletionTokenCount"])
    rows.writerows(("all", repr(one.at_s), one.prompt_tokens, one.output_tokens) for one in traffic)


def theirs(python: str, trace: str, *, native: bool, metrics: bool) -> dict[str, float]:
    case = json.dumps(CASE | {"native": native, "metrics": metrics})
    done = subprocess.run([python, str(SIDE), case, trace], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vidur did not run:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(traffic: Sequence[Arrival], site: Site) -> dict[str, float]:
    begun_s = cpu_s()
    totals = simulate(iter(traffic), site).totals
    found = {"run_s": cpu_s() - begun_s, "span_s": totals.last_s}
    return found | {"e2e_s": totals.e2e_s.mean or 0.0, "ttft_s": totals.ttft_s.mean or 0.0}


def show(name: str, requests: int, found: dict[str, float], than: float) -> None:
    """One line; `than` is our CPU seconds."""
    times = (f"{found[key]:.3f}" for key in ("span_s", "ttft_s", "e2e_s"))
    print(ROW.format(name, f"{requests / found['run_s']:.0f}", *times, f"{found['run_s'] / than:.1f}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests per CPU second of two simulators.")
    parser.add_argument("--vidur", required=True, metavar="PYTHON", help="an interpreter that has vidur")
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    for load, rate in RATES.items():
        traffic = list(arrivals(options.requests, rate))
        print(ROW.format(f"{options.requests} requests, {load}", "/CPU s", "span s", "TTFT s", "E2E s", "CPU x"))
        mine = ours(traffic, SITE)
        show("headrace", options.requests, mine, mine["run_s"])
        show("headrace, step by step", options.requests, ours(traffic, STEPPING), mine["run_s"])
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
            write_trace(file, traffic)
            file.flush()
            for native in (False, True):
                for metrics in (False, True):
                    found = theirs(options.vidur, file.name, native=native, metrics=metrics)
                    name = f"vidur, {'native' if native else 'Python'} predictor{', metrics' if metrics else ''}"
                    show(name, options.requests, found, mine["run_s"])
                    print(f"{'':>4}left out: {found['start_s']:.1f} s of start-up; peak {found['peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
