"""One model's way into memory and out of it: what the engine's host asks for, done with the device, in a process that
ends with the model or in a thread of this one.

What is small stays: words, grammars, counters, and what its files were. The scheduler stays too while the KV that it
knows is kept, in memory that belongs to this process; a `Seat` stands in for the executor meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from headrace.cli.assemble import Planned, find_model
from headrace.core import clock
from headrace.core.config import Bytes, EngineSettings
from headrace.core.facts import Expected, LoadFacts, ModelFacts
from headrace.core.metrics import Metrics
from headrace.core.ports import Capacity, Executor, Observer
from headrace.core.step import Run, StepPlan, StepResult
from headrace.device.apart import ApartExecutor
from headrace.device.child import Launch
from headrace.device.nursery import Nursery
from headrace.device.wire import Load
from headrace.engine.host import LoadFailed
from headrace.engine.residence import Sizes
from headrace.engine.watch import Watch

if TYPE_CHECKING:
    from headrace.cli.assemble import Watched
    from headrace.device.executor import ModelExecutor
    from headrace.device.grammar import Grammars
    from headrace.engine.loop import Engine
    from headrace.gateway.text import Text

WORKER: tuple[str, ...] = (sys.executable, "-m", "headrace.cli.worker")


@dataclass(frozen=True, slots=True)
class Known:
    """A model without its weights. `load`: what is to be loaded, but for the KV that it will get."""

    name: str
    facts: ModelFacts
    text: Text
    grammars: Grammars
    engine: EngineSettings
    load: Load
    expected: Expected
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def sizes(self) -> Sizes:
        one = self.expected
        return Sizes(one.weights, one.activations, one.kv_least, one.kv_wanted, one.process)


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in memory."""

    executor: ApartExecutor | ModelExecutor
    loaded: LoadFacts


class Door(Protocol):
    """How models get into memory."""

    async def open(self, known: Known, what: Load, packed: Callable[[int], None]) -> Opened:
        """`packed` hears from any thread how many bytes of weights are there."""
        ...

    async def closed(self) -> None:
        """An executor is closed and forgotten."""
        ...

    def close(self) -> None:
        """No model is in memory any more, and none will be."""
        ...


class Apart:
    """Each model in a process of its own, with which all its memory goes."""

    def __init__(self, nursery: Nursery | None = None) -> None:
        self.nursery = nursery

    async def open(self, known: Known, what: Load, packed: Callable[[int], None]) -> Opened:
        executor = ApartExecutor(Launch(WORKER, what, self.nursery))
        try:
            return Opened(executor, await asyncio.to_thread(partial(executor.start, packed=packed)))
        except BaseException:
            await executor.close()
            raise

    async def closed(self) -> None:
        """Nothing is left."""

    def close(self) -> None:
        if self.nursery is not None:
            self.nursery.close()


class Within:
    """All models in this process; `thread` computes their steps, one after the other."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread = thread

    async def open(self, known: Known, what: Load, packed: Callable[[int], None]) -> Opened:
        return await asyncio.to_thread(self._open, known, what, packed)

    def _open(self, known: Known, what: Load, packed: Callable[[int], None]) -> Opened:
        from headrace.device.checkpoint import open_checkpoint
        from headrace.device.control import Controls
        from headrace.device.kvstore import Kept
        from headrace.device.load import load_here

        loaded = load_here(
            open_checkpoint(find_model(what.model, lambda _: None)),
            what.device,
            what.block_tokens,
            what.max_running,
            what.step_tokens,
            what.host_bytes,
            lambda _: None,
            self.thread,
            kv=None if what.kv_fd is None else Kept(what.kv_fd, what.kv_kept),
            measured=not what.again,
            shared=True,
            packed=packed,
        )
        loaded.executor.controls = Controls(known.grammars, loaded.executor.capacity.vocab)
        return Opened(loaded.executor, loaded.facts())

    async def closed(self) -> None:
        from headrace.device.memory import give_back

        await asyncio.to_thread(give_back)

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)


class Seat:
    """An executor that may be away. Without one, all that can be asked is to forget requests. Of several
    models that share a `turn`, one computes at a time: two on the same cores would hold each other up in every step."""

    def __init__(self, executor: Executor, turn: asyncio.Lock | None = None) -> None:
        self.executor: Executor | None = executor
        self._capacity = executor.capacity
        self._turn = turn
        self.watch: Watch | None = None  # is to know that a step that waits for its turn is not late
        self._steps = 0  # under way
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    async def run(self, plan: StepPlan) -> StepResult:
        if self.executor is None:
            if plan.work:
                raise RuntimeError("a model that is not in memory was asked to compute")
            return StepResult(plan.step, {})
        self._steps += 1
        self._quiet.clear()
        try:
            return await self._run(self.executor, plan)
        finally:
            self._steps -= 1
            if not self._steps:
                self._quiet.set()

    async def _run(self, executor: Executor, plan: StepPlan) -> StepResult:
        if self._turn is None:
            return await executor.run(plan)
        if self.watch is not None:
            self.watch.waits(plan)
        async with self._turn:
            if self.watch is not None:
                self.watch.began(plan, clock.now())
            return await executor.run(plan)

    def interrupt(self) -> Run | None:
        return self.executor.interrupt() if self.executor else None

    async def close(self) -> None:
        """When the step under way is over: it may only tell of who has left, but its end in haste would be a loss."""
        executor, self.executor = self.executor, None
        await self._quiet.wait()
        if executor is not None:
            await executor.close()


@dataclass(slots=True)
class _Replica:
    """What outlives the weights while KV is kept."""

    planned: Planned
    seat: Seat
    engine: Engine
    watch: Watch
    running: asyncio.Task[None]


class ModelHouse:
    """An engine's `House`. `sized` is False where the model is alone and takes the KV that it would take without a
    ledger; it may be `opened` already."""

    def __init__(
        self,
        known: Known,
        door: Door,
        observer: Observer,
        sized: bool = True,
        watched: Watched = lambda executor, observer, settings, token_budget, step_s: (executor, observer),
        turn: asyncio.Lock | None = None,
        opened: Opened | None = None,
    ) -> None:
        self.known = known
        self.opened: Opened | None = None
        self._ready = opened
        self._door = door
        self._observer = observer
        self._sized = sized
        self._watched = watched
        self._turn = turn
        self._steps: tuple[tuple[int, float], ...] = ()  # measured the first time
        self._kv: int | None = None  # file descriptor of the memory under the KV, if it outlives the weights
        self._kept = False  # and what is in it is still good
        self._replica: _Replica | None = None
        self._capacity = known.expected.capacity

    @property
    def service(self) -> Engine | None:
        return self._replica.engine if self._replica else None

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def token_budget(self) -> int:
        return self._replica.planned.token_budget if self._replica else 0

    async def load(self, kv_bytes: int, told: Callable[[float], None]) -> tuple[Sizes, int]:
        """See `House`. Raises LoadFailed, with more in its cause."""
        loop, whole = asyncio.get_running_loop(), max(1, self.known.sizes.weights)

        def packed(count: int) -> None:
            loop.call_soon_threadsafe(told, min(0.99, count / whole))

        try:
            opened, self._ready = self._ready, None
            if opened is None:
                _check_files(self.known.facts)
                opened = await self._door.open(self.known, self._what(kv_bytes), packed)
            await self._take(opened)
        except BaseException as error:
            self.drop()
            await self._door.closed()
            if isinstance(error, LoadFailed) or not isinstance(error, Exception):
                raise
            raise LoadFailed("the server's log says why") from error
        one, memory = self.known.sizes, opened.loaded.memory
        return replace(one, weights=memory.weights, activations=memory.activations, process=opened.loaded.process), (
            memory.kv
        )

    def _what(self, kv_bytes: int) -> Load:
        """Everything as the first time, and KV as it was kept."""
        what = msgspec.structs.replace(self.known.load, again=bool(self._steps))
        if not self._sized:
            return what
        if self._kv is None and hasattr(os, "memfd_create"):
            self._kv = os.memfd_create("headrace KV", os.MFD_CLOEXEC)
        device = replace(what.device, kv_memory=Bytes(kv_bytes))
        return msgspec.structs.replace(what, device=device, kv_fd=self._kv, kv_kept=self._kept)

    async def _take(self, opened: Opened) -> None:
        """Put the executor behind the scheduler that knows its KV, or behind a new one."""
        self._steps = self._steps or opened.loaded.steps
        self.opened = opened
        if self._replica is None:
            seat = Seat(opened.executor, self._turn)
            planned = Planned.of(self.known.engine, seat, self._steps, self._observer, self._watched)
            watch = seat.watch = Watch(*planned.price)
            engine = planned.engine(self.known.name, watch)
            self._capacity = engine.capacity
            self._replica = _Replica(planned, seat, engine, watch, asyncio.create_task(engine.run()))
        self._replica.seat.executor = opened.executor
        if isinstance(opened.executor, ApartExecutor):
            opened.executor.watch = self._replica.watch
            await opened.executor.attend(self._replica.engine.lost)

    async def unload(self, keep_kv: bool) -> int:
        opened, replica = self.opened, self._replica
        assert opened is not None and replica is not None
        self.opened = None
        await replica.seat.close()
        now = replica.engine.status()
        # what is behind a tier in the host's memory would have to be kept as well
        here = self._kv is not None and opened.loaded.device == "cpu" and not self.known.engine.host_kv_memory
        self._kept = keep_kv and here and now.cached_blocks > 0 and not now.running and not now.waiting
        if not self._kept:
            await self._end()
        del opened, replica
        await self._door.closed()
        if not self._kept:
            self.drop()
        return _resident_bytes(self._kv) if self._kv is not None else 0

    def drop(self) -> None:
        """See `House`."""
        self._kept = False
        if self._kv is not None:
            os.close(self._kv)
            self._kv = None
        if self._replica is not None and self._replica.seat.executor is None:
            self._replica.running.cancel()
            self._replica = None

    async def _end(self) -> None:
        """The scheduler goes with the KV that it knew."""
        if self._replica is not None:
            self._replica.running.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(self._replica.running, return_exceptions=True)
            self._replica = None


def _resident_bytes(fd: int) -> int:
    """Of a file in memory, the pages that were ever written."""
    return 512 * os.fstat(fd).st_blocks


def _check_files(facts: ModelFacts) -> None:
    """Raises LoadFailed if a model is not the one any more that clients were told of."""
    for path, size, changed_ns in facts.files:
        try:
            now = os.stat(path)
        except OSError as error:
            raise LoadFailed("its file is not there any more") from error
        if (now.st_size, now.st_mtime_ns) != (size, changed_ns):
            raise LoadFailed("its file has changed since the server started; start it again")
