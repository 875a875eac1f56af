"""Drives one scheduler and one executor, and is the `Service` that the gateway holds: requests go straight into the
scheduler, outputs come out of one queue per request. Owns the streams and the replica's state; decides nothing about
what a step computes. The only file of the engine that knows asyncio.

    generate -> scheduler.add                    .--------- stream of one request -> its generator
                     |                           |
      expire, plan --+--> executor.run --> commit, or fail --> idle until something arrives

With several lanes, each has such a loop, and all of them share the scheduler and the executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from headrace.core import clock
from headrace.core.ports import Capacity, Executor, Status
from headrace.core.step import StepPlan
from headrace.core.types import FinishReason, Output, Request, RequestId, Unavailable
from headrace.engine.scheduler import Scheduler

FAILURES_IN_A_ROW = 3  # steps that may fail before the replica gives up


class Engine:
    """One replica. Whoever makes it runs `run()` as a task for as long as it should serve.

    A stream buffers what its own reader has not read yet: at most one output per token the request may draw.
    """

    def __init__(self, model: str, scheduler: Scheduler, executor: Executor) -> None:
        self._model = model
        self._scheduler = scheduler
        self._executor = executor
        self._streams: dict[RequestId, asyncio.Queue[Output]] = {}
        self._work = [asyncio.Event() for _ in range(scheduler.lanes)]  # something was added or ended: look again
        self._empty = asyncio.Event()  # no request is live
        self._empty.set()
        self._state = "ready"
        self._error: str | None = None
        self._failures = [0] * scheduler.lanes
        self._repeats = False  # the plan in flight stands for several steps
        self._last_progress_s: float | None = None

    def submit(self, request: Request) -> None:
        """Take a request whose outputs nobody reads: what becomes of it, the observer learns. Raises as `generate`."""
        if self._state != "ready":
            raise Unavailable(self._error or f"the replica is {self._state} and takes no new requests")
        self._interrupt()
        self._scheduler.add(request, clock.now())
        self._empty.clear()
        self._wake()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Outputs of one request; see `core.ports.Service`."""
        self.submit(request)
        stream = self._streams[request.id] = asyncio.Queue()
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finish is not None
                yield output
        finally:
            if not finished and self._streams.get(request.id) is stream:
                self.abort(request.id)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """See `core.ports.Service`."""
        self._interrupt()
        output = self._scheduler.abort(request_id, clock.now(), reason)
        if output is not None:
            self._deliver([output])
            self._wake()

    def status(self) -> Status:
        scheduler = self._scheduler
        return Status(
            model=self._model,
            state=self._state,
            capacity=self.capacity,
            running=scheduler.running,
            waiting=scheduler.waiting,
            waiting_tokens=scheduler.waiting_tokens,
            used_blocks=scheduler.used_blocks,
            steps=scheduler.steps,
            last_progress_s=clock.now() if self._last_progress_s is None else self._last_progress_s,
            error=self._error,
            cached_blocks=scheduler.cached_blocks,
        )

    @property
    def capacity(self) -> Capacity:
        return self._scheduler.capacity

    async def drain(self, timeout_s: float) -> bool:
        """See `core.ports.Service`. The replica takes no requests afterwards."""
        if self._state == "ready":
            self._state = "draining"
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            for request_id in self._scheduler.live_ids():
                self.abort(request_id)
            return False
        return True

    async def run(self) -> None:
        """Serve until cancelled, or until too many steps in a row have failed. Every stream gets its finish."""
        self._last_progress_s = clock.now()
        try:
            if len(self._work) == 1:
                await self._serve(0)
            else:
                await self._serve_side_by_side()
        except asyncio.CancelledError:
            self._give_up("the replica was stopped")
            raise
        except Exception as error:
            self._give_up(f"the replica stopped: {_describe(error)}")
            raise

    async def _serve(self, lane: int) -> None:
        work = self._work[lane]
        while self._state != "failed":
            now = clock.now()
            self._deliver(self._scheduler.expire(now))
            plan = self._scheduler.plan(now, lane)
            if plan is None:  # nobody is here, so no deadline can come either; or another lane is busy
                work.clear()
                await work.wait()
            else:
                await self._step(plan)

    async def _serve_side_by_side(self) -> None:
        """All lanes until one of them ends, which is for good."""
        lanes = [asyncio.create_task(self._serve(lane), name=f"lane {lane}") for lane in range(len(self._work))]
        try:
            ended, _ = await asyncio.wait(lanes, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in lanes:
                task.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    async def _step(self, plan: StepPlan) -> None:
        self._repeats = plan.steps > 1
        try:
            result = await self._executor.run(plan)
            now = clock.now()
            outputs = self._scheduler.commit(result, now)
        except Exception as error:  # whatever broke, the requests of this step must learn of it and the others go on
            failures = self._failures[plan.lane] = self._failures[plan.lane] + 1
            self._deliver(self._scheduler.fail(clock.now(), f"the step failed: {_describe(error)}", plan.lane))
            if failures >= FAILURES_IN_A_ROW:
                self._give_up(f"{failures} steps in a row failed, the last with {_describe(error)}")
        else:
            self._failures[plan.lane] = 0
            self._last_progress_s = now
            self._deliver(outputs)
        self._repeats = False
        if len(self._work) > 1:
            self._wake()
        await clock.sleep(0)  # readers of this step's outputs run before the next plan, whatever the executor does

    def _interrupt(self) -> None:
        """What happens now belongs to the step in progress, not behind all those that a plan may stand for."""
        if self._repeats:
            self._repeats = False
            over = self._executor.interrupt()
            if over is not None:
                self._scheduler.advance(over)

    def _wake(self) -> None:
        for work in self._work:
            work.set()

    def _deliver(self, outputs: Iterable[Output]) -> None:
        for output in outputs if self._streams else ():
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)
                if output.finish is not None:
                    del self._streams[output.request_id]
        if not self._scheduler.live:
            self._empty.set()

    def _give_up(self, error: str) -> None:
        """Nobody will be served any more; nobody may be left waiting for it."""
        self._state, self._error = "failed", error
        now = clock.now()
        for lane in range(len(self._work)):
            self._deliver(self._scheduler.fail(now, error, lane))
        for request_id in self._scheduler.live_ids():
            ended = self._scheduler.abort(request_id, now, FinishReason.ERROR)
            if ended is not None:
                self._deliver([ended._replace(error=error)])


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
