"""Drives several models in one process: what `Residence` decides is done here, and requests wait here for their model.
Owns those who wait and the one load or unload under way; decides nothing about memory.

    generate -> enter -----------------------------> service of the model
                  '-> waits -> Admit -----------------^      Load, Unload, Drop -> its House

Each model is a `Service` and a `Resident` of its own (`models`), and the host is a `Service` for all of them together.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from headrace.core import clock
from headrace.core.config import format_bytes
from headrace.core.ports import Capacity, Residency, Service, Status
from headrace.core.types import FinishReason, HeadraceError, Output, Overloaded, Request, RequestId, Unavailable, Usage
from headrace.engine.residence import Admit, Decision, Drop, Load, Refuse, Residence, Sizes, State, Unload

_RETRY_S = 5.0


class LoadFailed(HeadraceError):
    """A model cannot be loaded now. The sentence is for clients: it names no path of this machine."""


class House(Protocol):
    """One model's way into memory and out of it."""

    @property
    def service(self) -> Service | None:
        """Whoever answers while the model is in memory; what it was, or None, while it is not."""
        ...

    @property
    def capacity(self) -> Capacity:
        """What it will hold, as far as that is known."""
        ...

    async def load(self, kv_bytes: int, told: Callable[[float], None]) -> tuple[Sizes, int]:
        """Bring it into memory with so much KV, that which was kept included; `told` hears what share is done. Returns
        measured sizes, and the KV that it has. On any error nothing of it is left in memory."""
        ...

    async def unload(self, keep_kv: bool) -> int:
        """Nobody uses it. Returns the bytes of KV that are kept, which may be none."""
        ...

    def drop(self) -> None:
        """Give back the KV that was kept."""
        ...


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody before a model that is not there. `door` tells how waiting ended: None is well."""

    name: str
    request: Request | None
    door: asyncio.Future[FinishReason | None]

    @property
    def tokens(self) -> int:
        return self.request.prompt_tokens if self.request else 0


class Host:
    """Whoever makes it runs `run()` as a task for as long as it should serve. `told` hears a sentence about every load
    and unload."""

    def __init__(
        self,
        houses: Mapping[str, House],
        residence: Residence,
        most_waiting: tuple[int, int] = (1024, 1_000_000),
        told: Callable[[str], None] = lambda _: None,
        shown: Callable[[str, float], None] = lambda name, share: None,
    ) -> None:
        """`most_waiting` requests and prompt tokens before each model, beyond which new ones are refused; `shown` is
        called often while a model is loaded."""
        self.houses = houses
        self.residence = residence
        self.models = {name: Hosted(self, name) for name in houses}
        self.draining = False
        self._drain: tuple[float, float, int] | None = None  # when it began, when it ends, who was here
        self.done: dict[str, float] = {}  # of the load under way, the share
        self.errors: dict[str, str] = {}  # why the last load failed
        self._most_waiting = most_waiting
        self._told = told
        self._shown = shown
        self._waiting: dict[int, _Waiter] = {}  # by ticket
        self._moving: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._live = 0  # requests let in, and those that wait
        self._empty.set()

    async def run(self) -> None:
        """Until cancelled; then nothing is in memory any more."""
        try:
            while True:
                self._look()
                self._news.clear()
                wake_s = self.residence.wake_s(clock.now())
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(None if wake_s == math.inf else wake_s):
                        await self._news.wait()
        finally:
            self.draining = True
            self._end_waiting()
            if self._moving is not None:
                await asyncio.gather(self._moving, return_exceptions=True)
            for name, house in self.houses.items():
                if self.residence.state(name) is State.READY:
                    await house.unload(False)
                house.drop()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def enter(self, name: str, request: Request | None) -> FinishReason | None:
        """Wait until a model is in memory. None: it is, and `leave` has to follow; else how the request ended. Raises
        Overloaded or Unavailable."""
        self._check_room(name, request)
        self._look_after(name)
        ticket = self.residence.enter(name, clock.now())
        self._live += 1
        self._empty.clear()
        if ticket is None:
            return None
        waiter = self._waiting[ticket] = _Waiter(name, request, asyncio.get_running_loop().create_future())
        self._look()
        try:
            async with asyncio.timeout_at(request.deadline_s if request else None):
                ended = await waiter.door
        except BaseException as error:
            let_in = waiter.door.done() and not waiter.door.cancelled() and not waiter.door.exception()
            self._gone(ticket, let_in and waiter.door.result() is None)
            if isinstance(error, TimeoutError):
                return FinishReason.DEADLINE
            raise
        if ended is not None:
            self._gone(ticket, False)
        else:
            del self._waiting[ticket]
        return ended

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[None]:
        """A model in memory, for what is no request to it. Raises Overloaded or Unavailable."""
        if await self.enter(name, None) is not None:
            raise Unavailable("the server is draining and takes no new requests", self._drained_s())
        try:
            yield
        finally:
            self.leave(name)

    def leave(self, name: str) -> None:
        """A request that was let in has ended."""
        self._look_after(name)
        self.residence.leave(name, clock.now())
        self._less()

    def _look_after(self, name: str) -> None:
        """Nobody is sent to a replica that has given up."""
        service = self.houses[name].service
        if service is not None and self.residence.state(name) is State.READY and service.status().state == "failed":
            self.residence.broke(name)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        for waiter in self._waiting.values():
            if waiter.request is not None and waiter.request.id == request_id and not waiter.door.done():
                waiter.door.set_result(reason)
        for house in self.houses.values():
            if house.service is not None:
                house.service.abort(request_id, reason)

    def generate(self, request: Request) -> AsyncIterator[Output]:
        return self.models[request.model].generate(request)

    def status(self) -> Status:
        """Of the first model."""
        return next(iter(self.models.values())).status()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, finish the others, for which models are still loaded."""
        self.draining = True
        now = clock.now()
        self._drain = (now, now + timeout_s, self._live)
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            self._end_waiting()
            services = [house.service for house in self.houses.values() if house.service is not None]
            await asyncio.gather(*(service.drain(0.0) for service in services))
            return False
        return True

    def _drained_s(self) -> float | None:
        """Seconds until those who are here have left, at the rate at which others have since the drain began."""
        if self._drain is None:
            return None
        began_s, until_s, were = self._drain
        now, left = clock.now(), were - self._live
        rest_s = max(0.0, until_s - now)
        return min(rest_s, self._live * (now - began_s) / left) if left > 0 else rest_s

    def keep(self, name: str, seconds: float) -> None:
        self.residence.keep(name, seconds, clock.now())
        self._look()

    def waiting(self, name: str) -> tuple[int, int]:
        """Requests and prompt tokens that wait for a model."""
        tokens = [waiter.tokens for waiter in self._waiting.values() if waiter.name == name]
        return len(tokens), sum(tokens)

    def _check_room(self, name: str, request: Request | None) -> None:
        if self.draining:
            raise Unavailable("the server is draining and takes no new requests", self._drained_s())
        if self.residence.state(name) is State.READY:
            return
        requests, tokens = self.waiting(name)
        wanted = request.prompt_tokens if request else 0
        most_requests, most_tokens = self._most_waiting
        if requests >= most_requests or tokens + wanted > most_tokens:
            raise Overloaded(f"{requests} requests already wait for the model {name} to be loaded", _RETRY_S)

    def _gone(self, ticket: int, let_in: bool) -> None:
        """A request that waited does so no more, and does not use the model either."""
        waiter = self._waiting.pop(ticket)
        if let_in:
            self.residence.leave(waiter.name, clock.now())
        else:
            self.residence.withdraw(waiter.name, ticket)
        self._less()

    def _less(self) -> None:
        self._live -= 1
        if not self._live:
            self._empty.set()
        self._look()

    def _end_waiting(self) -> None:
        for waiter in self._waiting.values():
            if not waiter.door.done():
                waiter.door.set_result(FinishReason.ABORT)

    # -- what was decided ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Do what can be decided now; tell `run` that time may mean something else."""
        while (decision := self.residence.decide(clock.now())) is not None:
            self._do(decision)
        self._news.set()

    def _do(self, decision: Decision) -> None:
        match decision:
            case Admit(name, tickets):
                for ticket in tickets:
                    self._let_in(name, ticket)
            case Refuse(name, tickets, error):
                self._refuse(name, tickets, error)
            case Drop(name):
                self._told(f"{name}: the KV that was kept makes room")
                self.houses[name].drop()
            case Load():
                self._moving = asyncio.create_task(self._load(decision))
            case Unload():
                self._moving = asyncio.create_task(self._unload(decision))

    def _let_in(self, name: str, ticket: int) -> None:
        waiter = self._waiting[ticket]
        if waiter.door.done():  # its client has gone, or its time was up, and it is about to learn of that
            self.residence.leave(name, clock.now())
        else:
            waiter.door.set_result(None)

    def _refuse(self, name: str, tickets: tuple[int, ...], error: str, cause: BaseException | None = None) -> None:
        self.errors[name] = error
        self._told(f"{name}: {error}")
        for ticket in tickets:
            waiter = self._waiting[ticket]
            if not waiter.door.done():
                refusal = Unavailable(f"the model {name} cannot be loaded: {error}")
                refusal.__cause__ = cause
                waiter.door.set_exception(refusal)

    async def _load(self, decision: Load) -> None:
        name, begin_s = decision.name, clock.now()
        self._told(f"{name}: loading")
        self.done[name] = 0.0
        try:
            measured, kv = await self.houses[name].load(decision.kv_bytes, partial(self._progress, name))
            excess = self.residence.excess(name, measured, kv)
            if excess:
                await self.houses[name].unload(False)
        except Exception as error:
            self._failed(name, error)
        else:
            if excess:
                self._told(f"{name}: {excess}")
                self.residence.misjudged(name, measured)
                return self._look()
            self.errors.pop(name, None)
            self.residence.loaded(name, measured, kv, clock.now())
            parts = f"{format_bytes(measured.fixed)} and {format_bytes(kv)} of KV"
            self._told(f"{name}: ready after {clock.now() - begin_s:.2f} s, {parts}; {self._ledger()}")
        self._look()

    def _failed(self, name: str, error: Exception) -> None:
        sentence = str(error) if isinstance(error, LoadFailed) else "the server's log says why"
        if (cause := error.__cause__ or error) and str(cause) != sentence:
            self._told(f"{name}: {type(cause).__name__}: {cause}")
        self._refuse(name, self.residence.load_failed(name), sentence, error)

    def _progress(self, name: str, share: float) -> None:
        self.done[name] = share
        self._shown(name, share)

    async def _unload(self, decision: Unload) -> None:
        name, begin_s, kept = decision.name, clock.now(), 0
        try:
            kept = await self.houses[name].unload(decision.keep_kv)
        except Exception as error:
            self._told(f"{name}: unloading failed with {type(error).__name__}: {error}")
        self.residence.unloaded(name, kept)
        more = f", {format_bytes(kept)} of KV kept" if kept else ""
        self._told(f"{name}: unloaded in {clock.now() - begin_s:.2f} s{more}; {self._ledger()}")
        self._look()

    def _ledger(self) -> str:
        budget = self.residence.budget
        return f"{format_bytes(self.residence.used)} in use" + (
            "" if budget == math.inf else f" of {format_bytes(budget)}"
        )


class Hosted:
    """One model of a host: a `Service` whose requests wait until it is in memory, and a `Resident`."""

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        self._name = name

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        ended = await self._host.enter(self._name, request)
        if ended is not None:
            yield Output(request.id, finish=ended, usage=Usage(request.prompt_tokens, 0, 0))
            return
        try:
            service = self._host.houses[self._name].service
            assert service is not None, "a model that takes requests has somebody who answers"
            async with aclosing(service.generate(request)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    yield output
        finally:
            self._host.leave(self._name)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self._host.abort(request_id, reason)

    def status(self) -> Status:
        house, (requests, tokens) = self._host.houses[self._name], self._host.waiting(self._name)
        now = house.service.status() if house.service else _blank(self._name, house.capacity)
        state = "draining" if self._host.draining and now.state == "ready" else now.state
        return replace(now, state=state, waiting=now.waiting + requests, waiting_tokens=now.waiting_tokens + tokens)

    async def drain(self, timeout_s: float) -> bool:
        return await self._host.drain(timeout_s)

    def residency(self) -> Residency:
        name, residence = self._name, self._host.residence
        state: str = "yielding" if residence.yielding(name) else residence.state(name)
        share = self._host.done.get(name, 0.0) if state == "loading" else float(state in ("ready", "yielding"))
        return Residency(state, share, residence.charge(name), residence.leaves_s(name), self._host.errors.get(name))

    async def load(self) -> None:
        async with self._host.using(self._name):
            return

    def keep(self, seconds: float) -> None:
        self._host.keep(self._name, seconds)


def _blank(name: str, capacity: Capacity) -> Status:
    """Of a model that was never in memory: it takes requests, which wait for it."""
    return Status(name, "ready", capacity, 0, 0, 0, 0, 0, clock.now())
