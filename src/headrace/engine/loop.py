"""Drives one scheduler and one executor, and is the `Service` that the gateway holds: requests go straight into the
scheduler, outputs come out of one queue per request. Owns the streams and the replica's state; decides nothing about
what a step computes. The only file of the engine that knows asyncio.

    generate -> scheduler.add                    .--------- stream of one request -> its generator
                     |                           |
      expire, plan --+--> executor.run --> commit, or fail --> idle until something arrives

With several lanes, each has such a loop, and all of them share the scheduler and the executor. An executor that is lost
is started again, and all go on from the tokens they have; see `Scheduler.lost`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from headrace.core import clock
from headrace.core.ports import Capacity, Executor, ExecutorLost, Status
from headrace.core.step import StepPlan
from headrace.core.types import FinishReason, HeadraceError, Output, Overloaded, Request, RequestId, Unavailable
from headrace.engine.restarts import MOST, WINDOW_S, Restarts
from headrace.engine.scheduler import Scheduler
from headrace.engine.watch import Watch

LOG = logging.getLogger("headrace.engine")

FAILURES_IN_A_ROW = 3  # steps that may fail before the replica gives up
IDLE_S = 1.0  # without work, after which there is time for a look at the invariants
_LOOK_S = 1.0  # while the executor starts again, deadlines are looked at so often


class Engine:
    """One replica. Whoever makes it runs `run()` as a task for as long as it should serve.

    A stream buffers what its own reader has not read yet: at most one output per token the request may draw.
    """

    def __init__(
        self,
        model: str,
        scheduler: Scheduler,
        executor: Executor,
        *,
        watch: Watch | None = None,
        fresh: Callable[[], Scheduler] | None = None,
    ) -> None:
        """`watch` is told of every step. With `fresh`, the scheduler's invariants are checked when nothing has been to
        do for a while, and one that is not sound is put away for a fresh one."""
        self._model = model
        self._watch = watch
        self._fresh = fresh
        self._checked = 0  # steps there had been at the last check
        self._violations = 0
        self._restarts = Restarts()
        self._revival: asyncio.Task[None] | None = None  # while the executor starts again
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
        self._drain_until_s: float | None = None

    def submit(self, request: Request) -> None:
        """Take a request whose outputs nobody reads: what becomes of it, the observer learns. Raises as `generate`."""
        if self._state != "ready":
            raise Unavailable(self._error or f"the replica is {self._state} and takes no new requests", self._gone_s())
        self._interrupt()
        try:
            self._scheduler.add(request, clock.now())
        except Overloaded as error:
            if self._revival is None:
                raise
            raise Unavailable(f"the replica is restarting, and {error}") from error
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
        state, error = self._told()
        return Status(
            model=self._model,
            state=state,
            capacity=self.capacity,
            running=scheduler.running,
            waiting=scheduler.waiting,
            waiting_tokens=scheduler.waiting_tokens,
            used_blocks=scheduler.used_blocks,
            steps=scheduler.steps,
            last_progress_s=clock.now() if self._last_progress_s is None else self._last_progress_s,
            error=error,
            restarts=self._restarts.count,
            violations=self._violations,
            cached_blocks=scheduler.cached_blocks,
        )

    def _told(self) -> tuple[str, str | None]:
        """(state, why): ready means that tokens are moving."""
        if self._state == "ready" and self._revival is not None:
            return "restarting", self._error
        late = self._watch.overdue(clock.now()) if self._watch and self._state == "ready" else None
        return (self._state, self._error) if late is None else ("stalled", late)

    @property
    def capacity(self) -> Capacity:
        return self._scheduler.capacity

    async def drain(self, timeout_s: float) -> bool:
        """See `core.ports.Service`. The replica takes no requests afterwards."""
        if self._state == "ready":
            self._state = "draining"
        self._drain_until_s = clock.now() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            for request_id in self._scheduler.live_ids():
                self.abort(request_id)
            return False
        return True

    def _gone_s(self) -> float | None:
        """Seconds until a draining replica makes way for the next one."""
        if self._drain_until_s is None or self._state != "draining":
            return None
        now = clock.now()
        return max(0.0, min(self._drain_until_s - now, self._scheduler.drain_s(now)))

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
        finally:
            if self._revival is not None:
                self._revival.cancel()

    async def _serve(self, lane: int) -> None:
        work = self._work[lane]
        while self._state != "failed":
            if self._revival is not None:
                await asyncio.shield(self._revival)
                continue
            now = clock.now()
            self._deliver(self._scheduler.expire(now))
            plan = self._scheduler.plan(now, lane)
            if plan is None:  # nobody is here, so no deadline can come either; or another lane is busy
                work.clear()
                await self._rest(work)
            else:
                await self._step(plan)

    async def _rest(self, work: asyncio.Event) -> None:
        """Until there is work. If there is none for a while, the scheduler is looked at, once."""
        if self._fresh is not None and self._scheduler.steps != self._checked and not self._scheduler.live:
            try:
                async with asyncio.timeout(IDLE_S):
                    await work.wait()
                    return
            except TimeoutError:
                self._look_after(self._fresh)
        await work.wait()

    def _look_after(self, fresh: Callable[[], Scheduler]) -> None:
        """Check the scheduler. One that is not sound is put away for a fresh one: nobody is here to notice."""
        self._checked = self._scheduler.steps
        if self._scheduler.live:
            return
        try:
            self._scheduler.check()
        except AssertionError as error:
            self._violations += 1
            LOG.error("an invariant of the scheduler does not hold, so it is put away for a fresh one: %s", error)
            steps, self._scheduler = self._scheduler.steps, fresh()
            self._scheduler.steps = steps

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
        if self._watch is not None:
            self._watch.began(plan, clock.now())
        try:
            try:
                result = await self._executor.run(plan)
            finally:
                now = clock.now()
                if self._watch is not None:
                    self._watch.ended(plan, now)
            outputs = self._scheduler.commit(result, now)
        except ExecutorLost as error:
            self.lost(error)
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

    def lost(self, error: ExecutorLost) -> None:
        """The executor is gone. Whoever finds out says so: the step under way, or the executor itself when there is
        none; of several lanes only the first is heard."""
        if self._revival is not None or self._state == "failed":
            return
        LOG.warning("the executor was lost: %s; it is started again", error)
        self._error = f"the executor was lost: {error}"
        ended = self._scheduler.lost(clock.now(), str(error), error.begun)
        if self._watch is not None:
            self._watch.forget()
        if ended:
            self._restarts.explained()
        self._revival = asyncio.create_task(self._revive(error), name="revive")
        self._deliver(ended)
        self._wake()

    async def _revive(self, error: ExecutorLost) -> None:
        """Start the executor again, as often as it may be. Deadlines go on."""
        try:
            while (delay_s := self._restarts.next(clock.now())) is not None:
                try:
                    await self._meanwhile(error.again(delay_s))
                    self._error = None
                    return
                except HeadraceError as failed:
                    LOG.error("the executor did not start: %s", failed)
                    self._error = f"the executor was lost: {error}; it did not start again: {failed}"
            within = f"{MOST} times within {WINDOW_S / 60:.0f} minutes"
            self._give_up(f"the executor was started again {within}, and that is enough: {self._error}")
        except Exception as unforeseen:
            self._give_up(f"the executor cannot be started again: {_describe(unforeseen)}")
            raise
        finally:
            self._revival = None

    async def _meanwhile(self, starting: Awaitable[None]) -> None:
        task = asyncio.ensure_future(starting)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK_S)
                self._deliver(self._scheduler.expire(clock.now()))
            task.result()
        finally:
            task.cancel()

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
