"""How long `headrace plan` takes: the whole plan space of a 70B model on 8 GPUs and of a 671B mixture on 32, each with
a trace of 2,000 requests; a fleet of 10,000 GPUs; a newcomer's question. Wall and CPU seconds against the bounds.

Every question is a command in a process of its own, so the times are those of a shell that knows nothing yet, imports
included. Run alone on the machine, about two minutes: python benchmarks/planner_speed.py
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from dataclasses import dataclass

from headrace.core.clock import perf

CORES = 2  # the bounds are for two


@dataclass(frozen=True, slots=True)
class Asked:
    """A command after `headrace plan`, how long it may take, and what its answer must say to count."""

    name: str
    words: str
    bound_s: float
    says: str
    typed: str = ""  # at its questions


TRACE = "--requests 2000 --lengths azure-chat"
QUESTIONS = (
    Asked(
        "70B dense on 8 GPUs, 2,000 requests",
        f"llama-3.1-70b --devices 8xH100-SXM --formats bf16,fp8,int4 {TRACE} --arrivals poisson:6 "
        f"--slo ttft=1.0,tpot=0.05 --processes {CORES}",
        60.0,
        "RECOMMENDED",
    ),
    Asked(
        "671B mixture on 32 GPUs, 2,000 requests",
        f"deepseek-v3 --devices 4x8xH100-SXM@ib-ndr --formats fp8 {TRACE} --arrivals poisson:10 "
        f"--slo ttft=2.0,tpot=0.1 --processes {CORES}",
        60.0,
        "RECOMMENDED",
    ),
    Asked(
        "a fleet of 10,000 GPUs",
        f"pools llama-3.1-70b --device 8xH100-SXM --rate 16000 {TRACE} --arrivals poisson:10 --slo ttft=1.0,tpot=0.1",
        600.0,
        "simulated, one pool",
    ),
    Asked("a newcomer's question", "--interactive", 10.0, "RECOMMENDED", typed="\n" * 8),
    Asked(
        "a question in one line",
        "llama-3.1-8b --devices 2xL40S --arrivals poisson:2 --slo ttft=1.5,tpot=0.06",
        10.0,
        "RECOMMENDED",
    ),
    Asked("does it fit?", "fit llama-3.1-70b --device 4xH100-SXM", 10.0, "requests side by side"),
)


def used_s() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(asked: Asked) -> tuple[float, float, str]:
    """(wall seconds, CPU seconds, what it printed). Raises RuntimeError with what went wrong."""
    before_s, begun_s = used_s(), perf()
    command = [sys.executable, "-m", "headrace.cli", "plan", *asked.words.split()]
    done = subprocess.run(command, input=asked.typed, capture_output=True, text=True, check=False)
    wall_s = perf() - begun_s
    if done.returncode or asked.says not in done.stdout:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return wall_s, used_s() - before_s, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only questions whose name has this in it")
    parser.add_argument("--show", action="store_true", help="print the answers, too")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    fine = True
    print(f"{'question':42} {'wall s':>8} {'CPU s':>8} {'bound':>8}")
    for asked in (one for one in QUESTIONS if args.only in one.name):
        wall_s, cpu_s, printed = timed(asked)
        fine = fine and wall_s <= asked.bound_s
        verdict = "kept" if wall_s <= asked.bound_s else "MISSED"
        print(f"{asked.name:42} {wall_s:8.1f} {cpu_s:8.1f} {asked.bound_s:8.0f}  {verdict}", flush=True)
        if args.show:
            print(printed)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
