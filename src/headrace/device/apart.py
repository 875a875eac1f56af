"""An `Executor` whose work is done by a process of its own, so that what happens there happens there alone: a crash, a
kill, memory that ran out, a step without end. Owns the process and the socket to it; when either fails, every step
under way is told `ExecutorLost`, and `again` starts another process.

    parent   run(plan) -- frame --> .                   .--> result      no thread of ours waits: the loop reads
    child                           '-- step -- frame --'
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import msgspec

from headrace.core import clock
from headrace.core.config import Bytes
from headrace.core.facts import LoadFacts, ModelFacts
from headrace.core.ports import Capacity, Encoding, ExecutorLost
from headrace.core.step import StepPlan, StepResult
from headrace.core.types import HeadraceError
from headrace.device import wire
from headrace.device.child import Child, Launch, NotLoaded, ended

LOG = logging.getLogger("headrace.engine")

_LOOKS_S = 0.25  # between two looks at whether it hangs
_COMES_BACK_S = 60.0

T = TypeVar("T")


class StepFailed(HeadraceError):
    """One step went wrong; the process goes on."""


class Watching(Protocol):
    """Knows when a process hangs; see `engine.watch`."""

    def heard(self, now: float) -> None: ...

    def forget(self) -> None: ...

    def look(self, now: float) -> str | None: ...


class ApartExecutor:
    """`start` it, then use it in one event loop, from `attend` on. What it loaded is in `model` and `loaded`."""

    def __init__(self, launch: Launch, watch: Watching | None = None) -> None:
        self._launch = launch
        self.watch = watch
        self._child: Child | None = None
        self._link: _Link | None = None  # to the child, in the loop
        self._watching: asyncio.Task[None] | None = None
        self._burial: asyncio.Task[None] | None = None
        self._why = "it was not started"
        self._closed = False
        self._up = asyncio.Event()  # there is a link
        self._encodings = 0
        self.model: ModelFacts | None = None
        self.loaded: LoadFacts | None = None
        self._on_lost: Callable[[ExecutorLost], None] | None = None

    # -- its life ------------------------------------------------------------------------------------------------------

    def start(
        self,
        phase: Callable[[str], None] = lambda _: None,
        opened: Callable[[ModelFacts], None] = lambda _: None,
        packed: Callable[[int], None] = lambda _: None,
    ) -> LoadFacts:
        """Start the process and load the model; blocking. `phase` is told what begins, `opened` what the files say, as
        soon as that is known, `packed` how many bytes of weights are in memory. Raises NotLoaded."""
        phase("start the process that computes")
        self._child = child = Child(self._launch)
        try:
            if self._closed:
                raise NotLoaded("it was closed")
            model, loaded = child.load(self._launch.load, phase, opened, packed)
            self._same(model, loaded)
        except BaseException:
            child.end()
            raise
        if self.loaded is None or self.model is None:
            self.model, self.loaded = model, loaded
        return self.loaded

    def _same(self, model: ModelFacts, loaded: LoadFacts) -> None:
        """Who goes on with another model would give other answers. Raises NotLoaded."""
        if self.model is not None and self.model.files != model.files:
            changed = sorted({path for path, *_ in set(self.model.files) ^ set(model.files)})
            raise NotLoaded(
                f"{', '.join(changed[:3])} changed while the model was served, and answers that are under way cannot "
                "go on with another one; start the server again to serve it"
            )
        if self.loaded is not None and self.loaded.capacity.blocks != loaded.capacity.blocks:
            raise NotLoaded("there is other room for KV than before; start the server again")

    async def attend(self, on_lost: Callable[[ExecutorLost], None] | None = None) -> None:
        """From here on this loop hears what the process says. `on_lost` is told when it is lost while no step is under
        way; else the step is."""
        self._on_lost = on_lost or self._on_lost
        if self._child is not None and self._link is None and not self._closed:
            await self._connect(self._child)

    async def _connect(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        child.end_of_ours.setblocking(False)
        _, self._link = await loop.create_connection(
            lambda: _Link(child, self._gone, self._heard), sock=child.end_of_ours
        )
        self._up.set()
        if self.watch is not None:
            self.watch.forget()
            self.watch.heard(clock.now())
            self._watching = asyncio.create_task(self._look_after(child, self.watch), name="watchdog")

    async def _look_after(self, child: Child, watch: Watching) -> None:
        while self._child is child:
            why = watch.look(clock.now())
            if why is not None:
                LOG.error("the process that computes hangs: %s; it is killed", why)
                self._why = why
                child.kill()
                return
            await clock.sleep(_LOOKS_S)

    def _heard(self) -> None:
        if self.watch is not None:
            self.watch.heard(clock.now())

    def _gone(self, link: _Link, why: str | None) -> None:
        """Its socket is closed, or it said nonsense."""
        self._child, self._link = None, None
        self._up.clear()
        if self._watching is not None:
            self._watching.cancel()
        if not link.child.killed:
            self._why = why or "its process ended"
        self._burial = asyncio.create_task(self._bury(link, why))

    async def _bury(self, link: _Link, why: str | None) -> None:
        """Nothing is left of the process; then tell who waits for it."""
        status = await asyncio.to_thread(link.child.end)
        if not link.child.killed and why is None:
            self._why = ended(status)
        waited = link.fail(self._lost(True))
        if not waited and not self._closed and self._on_lost is not None:
            self._on_lost(self._lost(False))

    def _lost(self, begun: bool) -> ExecutorLost:
        return ExecutorLost(self._why, self._again, begun)

    async def _again(self, delay_s: float) -> None:
        """Another process, with all that the first one had but what it computed."""
        await clock.sleep(delay_s)
        if self._closed or self._child is not None:
            return
        assert self.loaded is not None
        began_s, load = clock.now(), self._launch.load
        device = replace(load.device, kv_memory=Bytes(self.loaded.memory.kv))
        self._launch = replace(
            self._launch, load=msgspec.structs.replace(load, device=device, again=True, kv_kept=False)
        )
        try:
            await asyncio.to_thread(self.start)
        except HeadraceError:
            self._child = None
            raise
        if self._child is not None:
            await self._connect(self._child)
            LOG.warning("the process that computes is back after %.1f s", clock.now() - began_s)

    async def close(self) -> None:
        """End the process, and give back all that it held, at once."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
        child, link = self._child, self._link
        self._child, self._link, self._why = None, None, "it was closed"
        if child is not None:
            child.kill()
        if link is not None:
            link.fail(self._lost(False))
            link.close()
            await link.closed.wait()
        if child is not None:
            await asyncio.to_thread(child.end)
        if self._burial is not None:
            await self._burial

    # -- its work ------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> Capacity:
        assert self.loaded is not None, "start it first"
        return self.loaded.capacity

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._child is None else self._child.process.pid

    async def run(self, plan: StepPlan) -> StepResult:
        """See `core.ports.Executor`. Raises StepFailed and ExecutorLost."""
        if self._link is None:
            await self.attend()
        if self._link is None:
            raise self._lost(False)
        return await self._link.ask(plan.step, wire.frame(wire.Step(wire.plan_out(plan))), self._link.steps)

    def interrupt(self) -> None:
        """Its plans stand for one step each."""

    @property
    def encoding(self) -> Encoding:
        assert self.loaded is not None and self.loaded.encoder is not None, "it has no embedding model"
        return self.loaded.encoder.encoding

    async def encode(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """See `core.ports.Encoder`. Waits for a process that starts again, once. Raises StepFailed and ExecutorLost."""
        try:
            return await self._encode(sequences)
        except ExecutorLost:
            async with asyncio.timeout(_COMES_BACK_S):
                await self._up.wait()
            return await self._encode(sequences)

    async def _encode(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        if self._link is None:
            await self.attend()
        if self._link is None:
            raise self._lost(False)
        self._encodings += 1
        number = self._encodings
        return await self._link.ask(number, wire.frame(wire.Encode(number, sequences)), self._link.encodings)


class _Link(asyncio.Protocol):
    """The socket in the loop: who asked what, and what came."""

    def __init__(self, child: Child, gone: Callable[[_Link, str | None], None], heard: Callable[[], None]) -> None:
        self.child = child
        self.steps: dict[int, asyncio.Future[StepResult]] = {}
        self.encodings: dict[int, asyncio.Future[list[bytes]]] = {}
        self._gone = gone
        self._heard = heard
        self._reader = wire.from_child()
        self._transport: asyncio.Transport | None = None
        self._why: str | None = None
        self.closed = asyncio.Event()

    async def ask(self, number: int, data: bytes, asked: dict[int, asyncio.Future[T]]) -> T:
        assert self._transport is not None
        future = asked[number] = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            return await future
        finally:
            asked.pop(number, None)

    def fail(self, error: ExecutorLost) -> bool:
        """Tell everybody who waits. Returns whether a step was under way."""
        waiting: list[asyncio.Future[Any]] = [*self.steps.values(), *self.encodings.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        return bool(self.steps)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except wire.BadFrame as error:
            self._why = f"it broke the format: {error}"
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._gone(self, self._why)

    def _take(self, message: wire.FromChild) -> None:
        match message:
            case wire.Done():
                _settle(self.steps.get(message.result.step), message.result)
            case wire.Encoded():
                _settle(self.encodings.get(message.number), message.vectors)
            case wire.Failed():
                asked: Mapping[int, asyncio.Future[Any]] = self.encodings if message.encoding else self.steps
                future = asked.get(message.number)
                if future is not None and not future.done():
                    future.set_exception(StepFailed(message.message))
        self._heard()


def _settle(future: asyncio.Future[T] | None, value: T) -> None:
    if future is not None and not future.done():
        future.set_result(value)
