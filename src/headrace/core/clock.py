"""Time: the only module that knows it. Virtual time is the base, wall time the variation.

All glue is ordinary asyncio. `run(main, virtual=True)` uses an event loop whose time is a number that jumps to the next
deadline when nothing else is ready, so an hour of traffic takes as long as its decisions take. Simultaneous timers
fire in the order they were set. When nothing is scheduled and nothing is ready the loop is deadlocked and says so;
threads are refused, because they would let wall time in.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# The loop whose time is virtual, in whatever it runs. Asking asyncio for the running loop asks the system for our id.
_virtual: ContextVar[VirtualLoop | None] = ContextVar("virtual", default=None)

_EPOCH_VIRTUAL_S = 1_700_000_000.0  # what the wall shows at virtual time 0: fixed, so that runs are reproducible


class Deadlock(RuntimeError):
    """Virtual time cannot advance: every task waits for something that nobody will do."""


def now() -> float:
    """Seconds on the running loop's monotonic clock (virtual or real); only differences mean anything."""
    loop = _virtual.get()
    return asyncio.get_running_loop().time() if loop is None else loop.virtual_s


async def sleep(seconds: float) -> None:
    """Sleeping for no time lets all others run who are ready."""
    if not jump(now() + seconds):
        await asyncio.sleep(seconds)


async def sleep_until(when_s: float) -> None:
    """Wake when `now()` reads `when_s`: under virtual time exactly that number, which a sum of durations may miss."""
    if jump(when_s):
        return
    loop = asyncio.get_running_loop()
    woken = loop.create_future()
    timer = loop.call_at(when_s, woken.set_result, None)
    try:
        await woken
    finally:
        timer.cancel()


def jump(when_s: float) -> bool:
    """Under virtual time, if nobody else has anything to do until then: it is `when_s` now, without a round of the
    loop. Otherwise False, and one has to sleep."""
    loop = _virtual.get()
    return loop is not None and loop.jump(when_s)


def spend(until_s: float) -> None:
    """The host was busy until `until_s`: virtual time passes while nobody else runs. Raises RuntimeError in real time,
    which passes by itself."""
    loop = _virtual.get()
    if loop is None:
        raise RuntimeError("only virtual time can be spent")
    loop.pass_until(until_s)


def virtual_now() -> float:
    """As `now()`, for whoever must not run in real time: raises RuntimeError there."""
    loop = _virtual.get()
    if loop is None:
        raise RuntimeError("this is a simulation: run it with clock.run(..., virtual=True)")
    return loop.virtual_s


def wall() -> float:
    """Seconds since 1970, for timestamps that leave the process. Never subtract two of these."""
    loop = _virtual.get()
    return time.time() if loop is None else _EPOCH_VIRTUAL_S + loop.virtual_s


def perf() -> float:
    """Seconds of real time, for measuring how long our own code took, outside any loop. Benchmarks only."""
    return time.perf_counter()


def run(main: Coroutine[Any, Any, T], *, virtual: bool = False) -> T:
    """Run a coroutine to completion, in real or in virtual time."""
    if not virtual:
        return asyncio.run(main)
    with Timeline() as timeline:
        return timeline.run(main)


class Timeline:
    """Virtual time that is run piece by piece: tasks that a piece has left behind go on with the next."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=VirtualLoop)
        self._context = copy_context()
        self._context.run(_virtual.set, self._runner.get_loop())  # type: ignore[arg-type]

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Until `main` is complete."""
        return self._runner.run(main, context=self._context)

    def close(self) -> None:
        """Cancel what is left."""
        self._runner.close()

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose time starts at 0 and jumps. It keeps its own timers and has no socket, not even to itself.
    Of asyncio's insides it replaces `_run_once` and uses `_ready`."""

    def __init__(self) -> None:
        self.virtual_s = 0.0
        self._order = 0
        self._cancelled = 0  # timers that wait in vain
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # a heap: equal times by order of creation
        super().__init__()

    def time(self) -> float:
        return self.virtual_s

    def pass_until(self, when_s: float) -> None:
        """Time never runs backwards."""
        self.virtual_s = max(self.virtual_s, when_s)

    def jump(self, when_s: float) -> bool:
        """Let time pass at once if sleeping would only be to go round the loop for nothing."""
        timers = self._timers
        if self._ready or self._stopping or (timers and timers[0][0] <= when_s):  # type: ignore[attr-defined]
            return False
        self.pass_until(when_s)
        return True

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's, but equal times fire in the order they were set."""
        self._order += 1
        when = max(when, self.virtual_s)
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, self._order, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is dropped when its time comes, or with others when most are cancelled."""
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled > len(self._timers) // 2:
            self._timers = [timer for timer in self._timers if not timer[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _run_once(self) -> None:
        """Run what is ready; if nothing is, jump to the next timer first."""
        ready: deque[asyncio.Handle] = self._ready  # type: ignore[attr-defined]
        timers = self._timers
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Deadlock(self._describe())
            self.pass_until(timers[0][0])
        while timers and timers[0][0] <= self.virtual_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    async def shutdown_default_executor(self, *_: object) -> None:
        """Nothing to shut down: there was never a thread."""

    def run_in_executor(self, *_: object) -> NoReturn:
        raise RuntimeError("threads are refused under virtual time: they would let wall time in")

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Only from the loop's own thread, where a signal handler may call it."""
        if threading.get_ident() != self._thread_id:  # type: ignore[attr-defined]
            raise RuntimeError("threads are refused under virtual time: they would let wall time in")
        return self.call_soon(callback, *args, context=context)

    def _describe(self) -> str:
        waiting = [f"  {task.get_name()}: {task.get_coro()}" for task in asyncio.all_tasks(self)]
        return "deadlock at virtual time {:.6f} s; every task waits:\n{}".format(self.virtual_s, "\n".join(waiting))
