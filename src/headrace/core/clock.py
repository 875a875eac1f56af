"""Time: the only module that knows it. Virtual time is the base, wall time the variation.

All glue is ordinary asyncio. `run(main, virtual=True)` uses an event loop whose time is a number that jumps to the next
deadline when nothing else is ready, so an hour of traffic takes as long as its decisions take. Simultaneous timers
fire in the order they were set. When nothing is scheduled and nothing is ready the loop is deadlocked and says so;
threads are refused, because they would let wall time in.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import selectors
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_EPOCH_VIRTUAL_S = 1_700_000_000.0  # what the wall shows at virtual time 0: fixed, so that runs are reproducible


class Deadlock(RuntimeError):
    """Virtual time cannot advance: every task waits for something that nobody will do."""


def now() -> float:
    """Seconds on the running loop's monotonic clock (virtual or real); only differences mean anything."""
    return asyncio.get_running_loop().time()


async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def sleep_until(when_s: float) -> None:
    """Wake when `now()` reads `when_s`: under virtual time exactly that number, which a sum of durations may miss."""
    loop = asyncio.get_running_loop()
    woken = loop.create_future()
    timer = loop.call_at(when_s, woken.set_result, None)
    try:
        await woken
    finally:
        timer.cancel()


def spend(until_s: float) -> None:
    """The host was busy until `until_s`: virtual time passes while nobody else runs. Raises RuntimeError in real time,
    which passes by itself."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualLoop):
        raise RuntimeError("only virtual time can be spent")
    loop.pass_until(until_s)


def is_virtual() -> bool:
    """Whether the running loop's time jumps instead of passing."""
    return isinstance(asyncio.get_running_loop(), VirtualLoop)


def wall() -> float:
    """Seconds since 1970, for timestamps that leave the process. Never subtract two of these."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return time.time()
    return _EPOCH_VIRTUAL_S + loop.time() if isinstance(loop, VirtualLoop) else time.time()


def perf() -> float:
    """Seconds of real time, for measuring how long our own code took, outside any loop. Benchmarks only."""
    return time.perf_counter()


def run(main: Coroutine[Any, Any, T], *, virtual: bool = False) -> T:
    """Run a coroutine to completion, in real or in virtual time."""
    factory = VirtualLoop if virtual else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time starts at 0 and jumps. Touches asyncio's `_scheduled` and `_clock_resolution`."""

    def __init__(self) -> None:
        self._virtual_s = 0.0
        self._order = 0
        super().__init__(_JumpingSelector(self))
        self._clock_resolution = math.ulp(0.0)

    def time(self) -> float:
        return self._virtual_s

    def jump(self, timeout_s: float | None) -> None:
        """Advance to the next deadline instead of waiting `timeout_s` for it."""
        if timeout_s is None:
            raise Deadlock(self._describe())
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if scheduled and timeout_s > 0:
            self.pass_until(scheduled[0].when())

    def pass_until(self, when_s: float) -> None:
        """Time never runs backwards."""
        self._virtual_s = max(self._virtual_s, when_s)
        # asyncio fires what is due before time + resolution: with one ulp, exactly what is due now
        self._clock_resolution = math.ulp(self._virtual_s)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's, but equal deadlines fire in the order they were set: heapq alone does not promise that."""
        self._order += 1
        timer = _OrderedTimer(max(when, self._virtual_s), callback, args, self, context)
        timer.order = self._order
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True
        return timer

    async def shutdown_default_executor(self, *_: object) -> None:
        """Nothing to shut down: there was never a thread."""

    def run_in_executor(self, *_: object) -> NoReturn:
        raise RuntimeError("threads are refused under virtual time: they would let wall time in")

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, **_: Any) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("threads are refused under virtual time: they would let wall time in")

    def _describe(self) -> str:
        waiting = [f"  {task.get_name()}: {task.get_coro()}" for task in asyncio.all_tasks(self)]
        return "deadlock at virtual time {:.6f} s; every task waits:\n{}".format(self._virtual_s, "\n".join(waiting))


class _OrderedTimer(asyncio.TimerHandle):
    """A timer that sorts by (deadline, order of creation)."""

    __slots__ = ("order",)
    order: int
    _scheduled: bool

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, _OrderedTimer):
            return NotImplemented
        return (self.when(), self.order) < (other.when(), other.order)


class _JumpingSelector(selectors.SelectSelector):
    """Waits for nothing: where a real selector would sleep, virtual time jumps. Sockets never become ready."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._jumping_loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._jumping_loop.jump(timeout)
        return []
