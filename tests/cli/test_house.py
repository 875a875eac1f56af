"""The seat of an executor among several that compute in turn."""

from __future__ import annotations

import asyncio

from headrace.cli.house import Seat
from headrace.core import clock
from headrace.core.ports import Capacity
from headrace.core.step import Run, StepPlan, StepResult
from headrace.engine.watch import SLACK_S, Watch


class Slow:
    """An executor that takes so long for everything."""

    def __init__(self, seconds: float) -> None:
        self.capacity = Capacity(8, 16, 128, 100)
        self._seconds = seconds

    async def run(self, plan: StepPlan) -> StepResult:
        await clock.sleep(self._seconds)
        return StepResult(plan.step, {})

    def interrupt(self) -> Run | None:
        return None

    async def close(self) -> None:
        return


def test_a_step_that_waits_for_its_turn_is_not_late_and_one_that_has_it_may_be() -> None:
    async def main() -> tuple[str | None, str | None]:
        turn, plan = asyncio.Lock(), StepPlan(0, ())
        watch = Watch(0.01, 0.001)
        first, second = Seat(Slow(100.0), turn), Seat(Slow(100.0), turn)
        second.watch = watch
        running = [asyncio.create_task(first.run(plan))]
        await clock.sleep(1.0)
        watch.began(plan, clock.now())  # as the engine's loop does
        running.append(asyncio.create_task(second.run(plan)))
        await clock.sleep(98.0)
        waiting = watch.overdue(clock.now())
        await clock.sleep(1.0 + SLACK_S + 1.0)
        computing = watch.overdue(clock.now())
        await asyncio.gather(*running)
        return waiting, computing

    waiting, computing = clock.run(main(), virtual=True)
    assert waiting is None
    assert computing is not None and "has taken 4" in computing
