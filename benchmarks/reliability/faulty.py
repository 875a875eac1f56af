"""The command `headrace` with a fault: once the file TRAP is there, the next step never ends, and the file is gone, so
that the process that is started instead computes as it should.

    python faulty.py TRAP serve MODEL ...            the command
    python faulty.py worker TRAP SOCKET              what it starts to compute
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli import house, housing, worker
from headrace.core.step import StepPlan, StepResult
from headrace.device import worker as process

if TYPE_CHECKING:
    from headrace.core.facts import ModelFacts
    from headrace.device.wire import Load


def main(arguments: list[str]) -> int:
    if arguments[0] == "worker":
        return process.main(process.from_argument(arguments[2]), trapped(Path(arguments[1])), worker.look)
    from headrace.cli import main as headrace

    for module in (house, housing):
        vars(module)["WORKER"] = (sys.executable, __file__, "worker", arguments[0])
    return headrace(arguments[1:])


def trapped(trap: Path) -> process.Loader:
    def load(
        what: Load,
        phase: Callable[[str], None],
        opened: Callable[[ModelFacts], None],
        packed: Callable[[int], None],
    ) -> process.Held:
        held = worker.load(what, phase, opened, packed)
        honest = held.executor.step

        def step(plan: StepPlan) -> StepResult:
            if trap.exists():
                trap.unlink()
                while True:  # it goes on giving signs of life: another thread does
                    pass
            return honest(plan)

        held.executor.step = step  # type: ignore[method-assign]
        return held

    return load


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
