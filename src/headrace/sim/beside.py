"""Steps of several lanes at the same time, in virtual time: how long each takes depends on what runs beside it.

Each step is an amount of work, 1 at first. While the same steps run it falls at the rate 1 / T, where T is what the
step would take from start to end beside the others; whenever one begins or ends, the T of all are priced anew.

    lane 0              |======== T = 3 ========|            1/3 done a second while lane 1 rests
    lane 1   |== T = 1 ==|=== T = 2 ===|== T = 1 ==|         slower beside it
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from headrace.core import clock
from headrace.sim.cost.batch import StepCost
from headrace.sim.cost.divided import Divided, Price
from headrace.sim.spent import Spent


@dataclass(slots=True, eq=False)
class _Going:
    """One step under way."""

    price: Price
    share: float
    over: asyncio.Future[None]
    left: float = 1.0
    cost: StepCost = StepCost(0.0)  # beside those that run now
    timer: asyncio.TimerHandle | None = None


class Beside:
    """`spent` hears what steps cost, piece by piece."""

    def __init__(self, prices: Divided, spent: Spent | None) -> None:
        self._prices = prices
        self._spent = spent
        self._going: list[_Going] = []
        self._priced_s = 0.0  # when they were last priced

    async def run(self, price: Price, share: float) -> None:
        """Let the time of one step pass."""
        one = _Going(price, share, asyncio.get_running_loop().create_future())
        self._settle()
        self._going.append(one)
        try:
            self._time()
            await one.over
        finally:
            if one.timer is not None:
                one.timer.cancel()
            self._settle()
            self._going.remove(one)
            self._time()

    def _settle(self) -> None:
        """What was done since the last change."""
        now = clock.virtual_now()
        for one in self._going:
            done = min((now - self._priced_s) / one.cost.seconds, one.left) if one.cost.seconds else one.left
            one.left -= done
            if self._spent is not None:
                self._spent.add(one.cost, done)
        self._priced_s = now

    def _time(self) -> None:
        """When each ends if nothing changes again."""
        loop = asyncio.get_running_loop()
        for one, cost in zip(
            self._going, self._prices.beside([(one.price, one.share) for one in self._going]), strict=True
        ):
            one.cost = cost
            if one.timer is not None:
                one.timer.cancel()
            one.timer = loop.call_at(self._priced_s + one.left * cost.seconds, _finish, one.over)


def _finish(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)
