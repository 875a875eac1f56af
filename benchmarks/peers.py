"""Headrace against llama.cpp, OpenVINO GenAI and, if asked, vLLM: the same files and cases in interleaved rounds.

Set the peers up once with `make peers`, then, on an idle machine:

    python benchmarks/peers.py                                             # all cases, five rounds
    python benchmarks/peers.py --headrace "--dtype fp32" --cases one,32 --rounds 2
    python benchmarks/peers.py --model gemma3
    python benchmarks/peers.py --vllm PYTHON --vllm-model FOLDER           # a Python with vLLM, and safetensors

    one        one request, 128 in / 128 out: tokens/s after the first
    32, 64     so many at once, 128 in / 128 out: output tokens/s of the whole time
    prefill    one prompt of 1,024 tokens: tokens/s
    prefix     32 at once that share 1,024 of their 1,056 tokens, 32 out: seconds
    ahead      the same, but the first of them alone, then the others: some caches fill when a request ends
    busy       cases one and 32 again beside a process that keeps one core busy
    http       case 32 through `headrace serve` and `headrace bench`, beside the same without HTTP
    fresh      a new process: seconds to its first token, and its peak memory after case 32

Prompts are random tokens, other ones in every round. llama.cpp is driven with its own batched-bench, which has no
scheduler and streams to nobody, on the file as it is and on one requantised to Q4_0; its prefix cases compute the
shared tokens once and leave out the 32 that each request has of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Protocol

import psutil
from server import bench, serving

from headrace.core import clock
from headrace.draw.text import aligned, short, three

ENGINES = Path(__file__).with_name("peer_engines.py")
NOTED = 0.05  # cores that others may keep busy before a measurement is marked
FLAGS = ["--max-context", "2048"]


@dataclass(frozen=True, slots=True)
class Case:
    """So many requests at once. `shared` of their `prompt` tokens are the same."""

    name: str
    requests: int
    prompt: int
    output: int
    shared: int = 0
    seconds: bool = False  # what counts is how long it takes, and less is better
    ahead: int = 0  # requests that go first, alone

    def prompts(self, number: int) -> list[list[int]]:
        """Of one round."""
        draw = Random(f"{self.name} {number}")
        prefix = draw.choices(range(1000, 40000), k=self.shared)
        return [prefix + draw.choices(range(1000, 40000), k=self.prompt - self.shared) for _ in range(self.requests)]

    def value(self, first_s: float, wall_s: float) -> float:
        if self.seconds:
            return wall_s
        if self.output == 1:
            return self.prompt / wall_s
        if self.requests == 1:
            return (self.output - 1) / (wall_s - first_s)
        return self.requests * self.output / wall_s


CASES = (
    Case("one", 1, 128, 128),
    Case("32", 32, 128, 128),
    Case("64", 64, 128, 128),
    Case("prefill", 1, 1024, 1),
    Case("prefix", 32, 1056, 32, shared=1024, seconds=True),
    Case("ahead", 32, 1056, 32, shared=1024, seconds=True, ahead=1),
)
BUSY, HTTP, FRESH = "busy", "http", "fresh"
NAMES = (*(case.name for case in CASES), BUSY, HTTP, FRESH)
WARMING = Case("warming", 2, 64, 8)
FIRST = Case("first", 1, 16, 1)


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    def play(self, case: Case, number: int) -> float:
        """What the case counts. Raises Refused."""
        ...

    def fresh(self) -> tuple[float, float]:
        """(seconds to the first token of a new process, its peak bytes after case 32). Raises Refused."""
        ...

    def close(self) -> None: ...


class Refused(Exception):
    """The contestant cannot do that; the message says why."""


class Worker:
    """An engine in a process of its own, which stays for all rounds."""

    def __init__(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self._command = command
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[str] | None = None

    def play(self, case: Case, number: int) -> float:
        if self._process is None:
            self._process = self._started()
            self._ask(self._process, WARMING, 0)
        return case.value(*self._ask(self._process, case, number))

    def fresh(self) -> tuple[float, float]:
        begin = clock.perf()
        process = self._started()
        try:
            self._ask(process, FIRST, 0)
            ready_s = clock.perf() - begin
            self._ask(process, CASES[1], -1)
            return ready_s, peak_bytes(process.pid)
        finally:
            _stop(process)

    def close(self) -> None:
        if self._process is not None:
            _stop(self._process)
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        with open(os.devnull, "w") as nowhere:
            return subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=nowhere, text=True, env=self._env
            )

    def _ask(self, process: subprocess.Popen[str], case: Case, number: int) -> tuple[float, float]:
        """Seconds to the first token, and to the last."""
        prompts = case.prompts(number)
        first_s, wall_s = self._send(process, prompts[: case.ahead] or prompts, case)
        if case.ahead:
            wall_s += self._send(process, prompts[case.ahead :], case)[1]
        return first_s, wall_s

    def _send(self, process: subprocess.Popen[str], prompts: list[list[int]], case: Case) -> tuple[float, float]:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"prompts": prompts, "output": case.output}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Refused(f"{self.name} ended; run it by hand to see why: {shlex.join(self._command)}")
        answer = json.loads(line)
        if answer["tokens"] != len(prompts) * case.output:
            raise Refused(f"{self.name} made {answer['tokens']} tokens in case {case.name}")
        return answer["first_s"], answer["wall_s"]


class LlamaCpp:
    """llama.cpp on one file, a process for every measurement."""

    def __init__(self, name: str, tools: Path, model: Path, threads: int) -> None:
        self.name = name
        self._command = [str(tools / "llama-batched-bench"), "-m", str(model), "-t", str(threads), "-tb", str(threads)]
        self._command += ["-b", "2048", "-ub", "512", "--output-format", "jsonl"]

    def play(self, case: Case, number: int) -> float:
        found, _, _ = self._run(case)
        return case.value(found["t_pp"], found["t_pp"] if case.output == 1 else found["t"])

    def fresh(self) -> tuple[float, float]:
        _, ready_s, _ = self._run(FIRST)
        _, _, peak = self._run(CASES[1])
        return ready_s, peak

    def close(self) -> None:
        """Nothing stays."""

    def _run(self, case: Case) -> tuple[dict[str, Any], float, float]:
        """(its numbers, seconds of the process, its peak bytes)."""
        prompt, cells = (case.shared or case.prompt), case.requests * (case.prompt + case.output)
        sizes = ["-npp", str(prompt), "-ntg", str(case.output), "-npl", str(case.requests), "-c", str(cells)]
        shared = ["-pps", "-kvu"] if case.shared else []
        begin, peak = clock.perf(), 0.0
        with subprocess.Popen(
            [*self._command, *sizes, *shared], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            printed: list[str] = []
            reading = threading.Thread(target=lambda: printed.extend(process.communicate()))
            reading.start()
            while reading.is_alive():
                peak = max(peak, peak_bytes(process.pid))
                reading.join(0.05)
        took = clock.perf() - begin
        lines = [line for line in printed[0].splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            raise Refused(f"{self.name} failed: {printed[1].strip().splitlines()[-1:]}")
        return json.loads(lines[-1]), took, peak


def peak_bytes(pid: int) -> float:
    """The most memory a running process has had resident; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended by itself
        process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps one core busy, and ends when this one is gone."""
    spinning = "import os\nwhile os.getppid() == {}:\n    for _ in range(1_000_000): pass"
    with subprocess.Popen([sys.executable, "-c", spinning.format(os.getpid())]) as process:
        try:
            yield
        finally:
            process.kill()


class Others:
    """How many cores processes that are not ours keep busy."""

    def __init__(self) -> None:
        self._begin = (clock.perf(), _machine_s(), _own_s())

    def cores(self) -> float:
        begin, machine_s, own_s = self._begin
        return max(0.0, (_machine_s() - machine_s - _own_s() + own_s) / (clock.perf() - begin))


def _machine_s() -> float:
    used = psutil.cpu_times()
    return float(used.user + used.nice + used.system + used.irq + used.softirq)


def _own_s() -> float:
    """Of this process, its children, and those that have ended."""
    total, me = 0.0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


@dataclass(frozen=True, slots=True)
class Entry:
    """One measurement of a round."""

    names: tuple[str, ...]  # of its values
    who: str
    measured: Callable[[], Sequence[float]]
    beside: bool = False  # a busy neighbour


@dataclass(slots=True)
class Results:
    """(case, contestant) -> a value for every round."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, entry: Entry) -> None:
        """Measure, keep and print."""
        contestant, case = entry.who, ", ".join(entry.names)
        others = Others()
        try:
            with neighbour() if entry.beside else nullcontext():
                found = entry.measured()
        except Refused as refused:
            note = f"{contestant}, {case}: {refused}"
            if note not in self.notes:
                self.notes.append(note)
            print(f"  {note}", flush=True)
            return
        busy = others.cores()
        for name, value in zip(entry.names, found, strict=True):
            self.values.setdefault((name, contestant), []).append(value)
        mark = f"   (others kept {busy:.2f} cores busy)" if busy > NOTED else ""
        if mark:
            self.notes.append(f"{contestant}, {case}:{mark}")
        print(f"  {case:24} {contestant:32} {', '.join(short(three(value)) for value in found)}{mark}", flush=True)


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """Those that are asked for and there, Headrace first."""
    peers, threads = Path(args.peers), str(args.threads)
    model = args.file or peers / "models" / f"{args.model}.gguf"
    if not Path(model).exists():
        raise SystemExit(f"{model} is not there; run `make peers` first, or name the folder with --peers")
    found: list[Contestant] = []
    for flags in args.headrace or [""]:
        command = [sys.executable, str(ENGINES), "headrace", str(model), "--threads", threads, *FLAGS]
        found.append(Worker(f"headrace {flags}".strip(), [*command, *shlex.split(flags)]))
    if not args.only_headrace:
        python = str(peers / "venv" / "bin" / "python")
        found.append(Worker("openvino", [python, str(ENGINES), "openvino", str(model), "--threads", threads]))
        for name, file in (("llama.cpp", model), ("llama.cpp Q4_0", peers / "models" / f"{args.model}-Q4_0.gguf")):
            found.append(LlamaCpp(name, peers / "llamacpp" / "bin", Path(file), args.threads))
    if args.vllm:
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": threads}
        env |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}"}
        found.append(Worker("vllm", [args.vllm, str(ENGINES), "vllm", args.vllm_model], env))
    return [one for one in found if one.name not in args.without]


def play(args: argparse.Namespace, wanted: Sequence[str]) -> Results:
    """All rounds. Who begins changes from round to round."""
    results, entered = Results(), contestants(args)
    try:
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", flush=True)
            turn = entered[number % len(entered) :] + entered[: number % len(entered)]
            for entry in schedule(args, wanted, turn, number):
                results.take(entry)
    finally:
        for one in entered:
            one.close()
    return results


def schedule(
    args: argparse.Namespace, wanted: Sequence[str], turn: Sequence[Contestant], number: int
) -> Iterator[Entry]:
    """One round: case by case, everybody in turn."""
    for case in CASES:
        if case.name in wanted:
            yield from (Entry((case.name,), one.name, partial(_played, one, case, number)) for one in turn)
    for case in CASES[:2] if BUSY in wanted else ():
        name = f"{case.name}, one busy neighbour"
        yield from (Entry((name,), one.name, partial(_played, one, case, number + 1000), beside=True) for one in turn)
    for flags in (args.headrace or [""]) if HTTP in wanted else ():
        yield Entry(("32 over HTTP",), f"headrace {flags}".strip(), partial(http, args, flags, number))
    if FRESH in wanted:
        yield from (Entry(("ready, s", "peak memory, MB"), one.name, partial(_fresh, one)) for one in turn)


def _played(one: Contestant, case: Case, number: int) -> list[float]:
    return [one.play(case, number)]


def _fresh(one: Contestant) -> list[float]:
    ready_s, peak = one.fresh()
    return [ready_s, peak / 1e6]


def http(args: argparse.Namespace, flags: str, number: int) -> list[float]:
    """Output tokens/s of case 32 through the server and the load generator, both on this machine."""
    model = args.file or Path(args.peers) / "models" / f"{args.model}.gguf"
    case = CASES[1]
    many = ["--concurrency", "32", "--requests", "32", "--input", str(case.prompt), "--output", str(case.output)]
    with serving(str(model), "--threads", str(args.threads), *FLAGS, *shlex.split(flags)) as (url, _):
        run = bench(url, *many, "--seed", str(number))
    if run["failed"] or run["short_outputs"]:
        raise Refused(f"{run['failed']} requests failed, {run['short_outputs']} were short")
    return [float(run["output_throughput"])]


LESS = ("prefix", "ahead", "ready, s", "peak memory, MB")  # where less is better


def told(results: Results) -> str:
    """Medians, and Headrace's as a ratio to the best peer's; then what the rounds were disturbed by."""
    names = list(dict.fromkeys(name for _, name in results.values))
    ours = [name for name in names if name.startswith("headrace")]
    rows = [["case", *names, *(f"{name} / best peer" for name in ours)]]
    for case in dict.fromkeys(case for case, _ in results.values):
        found = {name: median(results.values[case, name]) for name in names if (case, name) in results.values}
        cells = [short(three(found[name])) if name in found else "-" for name in names]
        peers = [value for name, value in found.items() if name not in ours]
        best = (min(peers) if case in LESS else max(peers)) if peers else None
        cells += [f"{found[name] / best:.2f}x" if best and name in found else "-" for name in ours]
        rows.append([case + (" (less is better)" if case in LESS else ""), *cells])
    lines = aligned(rows, "<" + ">" * (len(rows[0]) - 1))
    return "\n".join(["", *lines, "", *_own_ratios(results, ours), *(f"note: {note}" for note in results.notes)])


def _own_ratios(results: Results, ours: Sequence[str]) -> Iterator[str]:
    """Headrace against itself: through HTTP, and beside a neighbour, who takes one of the cores."""
    cores = os.cpu_count() or 1
    for name in ours:
        alone = {case: median(values) for (case, who), values in results.values.items() if who == name}
        if "32" in alone and "32 over HTTP" in alone:
            yield f"{name}: {alone['32 over HTTP'] / alone['32']:.0%} of its offline throughput over HTTP"
        for case in ("one", "32"):
            beside = alone.get(f"{case}, one busy neighbour")
            if beside and case in alone:
                left = alone[case] * (cores - 1) / cores
                yield f"{name}, {case}: {beside / left:.0%} of what a busy neighbour leaves it in theory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=".venv-peers", metavar="FOLDER", help="where `make peers` put them")
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "gemma3"))
    parser.add_argument("--file", type=Path, metavar="GGUF", help="read this file instead, but for llama.cpp's Q4_0")
    parser.add_argument(
        "--headrace", action="append", metavar="FLAGS", help="flags of Headrace; again for another entry"
    )
    parser.add_argument("--only-headrace", action="store_true", help="no peers")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave this one out")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--vllm-model", metavar="FOLDER")
    parser.add_argument("--cases", default=",".join(NAMES), help=f"(default: {','.join(NAMES)})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every value to this JSON file")
    args = parser.parse_args()
    wanted = args.cases.split(",")
    if unknown := set(wanted) - set(NAMES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results = play(args, wanted)
    print(told(results))
    if args.save:
        values = [{"case": case, "who": who, "values": found} for (case, who), found in results.values.items()]
        args.save.write_text(json.dumps({"results": values, "notes": results.notes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
