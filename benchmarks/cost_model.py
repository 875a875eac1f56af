"""What pricing a step costs the simulator: microseconds per call of `estimate`, `line` and `batch_of`, best of many.

Run `python benchmarks/cost_model.py`. The best of several repeats is printed, as other load only ever adds.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, CostModel, batch_of, windows_of
from headrace.sim.cost.fewshot import fit_few, reference_batches
from headrace.sim.cost.fit import Sample
from headrace.sim.cost.linear import fit_linear
from headrace.sim.cost.placement import Parallel, Placement
from headrace.sim.cost.table import Table
from headrace.sim.hardware import Topology, device
from headrace.sim.models import model

CALLS, REPEATS = 2000, 25
PLACEMENTS = (("llama-3.1-70b", 4), ("gpt-oss-120b", 2), ("deepseek-v3", 8))


def microseconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e6


def report(name: str, cost: CostModel, windows: tuple[int, ...] = ()) -> None:
    rows = [(1000 + 7 * i, 1) for i in range(64)]
    decode, mixed = batch_of(rows, 64, windows), batch_of([*rows, (0, 448)], 64, windows)
    lines: dict[str, Callable[[], object]] = {
        "estimate, decodes": lambda: cost.estimate(decode),
        "estimate, mixed": lambda: cost.estimate(mixed),
        "line of 100 steps": lambda: cost.line(decode, 100),
        "fold 64 rows": lambda: batch_of(rows, 64, windows),
    }
    for label, call in lines.items():
        print(f"{name:22} {label:18} {microseconds(call):7.2f} us")


def samples(cost: CostModel) -> list[Sample]:
    batches: list[Batch] = reference_batches()
    return [Sample(batch, cost.estimate(batch).seconds) for batch in batches]


def main() -> None:
    for name, tensor in PLACEMENTS:
        shape = model(name)
        placement = Placement(shape, Topology(device("H200-SXM"), 8), Parallel(tensor=tensor))
        report(name, Analytic(placement), windows_of(shape))
    base = Analytic(Placement(model("llama-3.1-8b"), Topology(device("A100-80GB"), 1)))
    measured = samples(base)
    report("linear", fit_linear(measured))
    report("few-shot", fit_few(base, measured))
    report("table of ten", Table(measured))


if __name__ == "__main__":
    main()
