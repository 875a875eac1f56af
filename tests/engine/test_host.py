"""The host of several models, in virtual time, with houses whose loads take a while or fail as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from headrace.core import clock
from headrace.core.ports import Capacity, Status
from headrace.core.types import Blank, FinishReason, Output, Overloaded, Request, Unavailable, Usage
from headrace.engine.host import Host, LoadFailed
from headrace.engine.residence import Residence, Sizes, State, Terms

CAPACITY = Capacity(blocks=8, block_tokens=16, max_context_tokens=128, vocab=10, layers=1)
LOAD_S, UNLOAD_S, ANSWER_S = 2.0, 1.0, 0.5


class Replica:
    """A `Service` that answers after a while."""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, "ready"
        self.aborted: set[str] = set()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        yield Output(request.id, token_ids=(1,))
        await clock.sleep(ANSWER_S)
        usage = Usage(request.prompt_tokens, 1, 0)
        yield Output(request.id, finish=FinishReason.STOP, usage=usage)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.add(request_id)

    def status(self) -> Status:
        return Status(self.name, self.state, CAPACITY, 0, 0, 0, 0, 0, 0.0)

    async def drain(self, timeout_s: float) -> bool:
        return True


class House:
    """`fails`: why the next loads fail; `takes`: what it measures."""

    def __init__(self, name: str, takes: Sizes) -> None:
        self.name, self.takes = name, takes
        self.service: Replica | None = None
        self.capacity = CAPACITY
        self.fails: list[Exception] = []
        self.loads = self.kept = 0

    async def load(self, kv_bytes: int, told: Callable[[float], None]) -> tuple[Sizes, int]:
        await clock.sleep(LOAD_S / 2)
        told(0.5)
        await clock.sleep(LOAD_S / 2)
        if self.fails:
            raise self.fails.pop()
        self.loads, self.kept, self.service = self.loads + 1, 0, Replica(self.name)
        return self.takes, kv_bytes

    async def unload(self, keep_kv: bool) -> int:
        await clock.sleep(UNLOAD_S)
        self.service, self.kept = None, 5 if keep_kv else 0
        return self.kept

    def drop(self) -> None:
        self.kept = 0


class Rig:
    """Models of 100 bytes each."""

    def __init__(self, budget: float, *names: str, most_waiting: tuple[int, int] = (8, 1000), **terms: Any) -> None:
        sizes = Sizes(100, 0, 10, 10)
        self.houses = {name: House(name, sizes) for name in names}
        self.lines: list[str] = []
        ledger = Residence({name: Terms(sizes, **terms) for name in names}, budget)
        self.host = Host(self.houses, ledger, most_waiting, self.lines.append)
        self._ids = 0

    def request(self, model: str, **fields: Any) -> Request:
        self._ids += 1
        return Request(f"r{self._ids}", (Blank(4),), clock.now(), 1, model=model, **fields)

    async def ask(self, model: str, **fields: Any) -> FinishReason | None:
        request, finish = self.request(model, **fields), None
        async for output in self.host.generate(request):
            finish = output.finish
        return finish


def living(rig: Rig, story: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        running = asyncio.create_task(rig.host.run())
        try:
            await story(rig)
            rig.host.residence.check()
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
        assert all(house.service is None and not house.kept for house in rig.houses.values()), "something is left"

    clock.run(main(), virtual=True)


def test_a_request_waits_for_its_model_and_two_take_turns() -> None:
    async def story(rig: Rig) -> None:
        begin = clock.now()
        assert await rig.ask("a") is FinishReason.STOP
        assert clock.now() - begin == LOAD_S + ANSWER_S
        assert await asyncio.gather(rig.ask("b"), rig.ask("b"), rig.ask("a")) == [FinishReason.STOP] * 3
        assert [house.loads for house in rig.houses.values()] == [2, 1], "b made room for itself, and then a did"

    living(Rig(150, "a", "b"), story)


def test_what_fits_stays() -> None:
    async def story(rig: Rig) -> None:
        for name in "abab":
            await rig.ask(name)
        assert [house.loads for house in rig.houses.values()] == [1, 1]

    living(Rig(300, "a", "b"), story)


def test_a_load_that_fails_is_told_to_those_who_wait_for_it_and_to_nobody_else() -> None:
    async def story(rig: Rig) -> None:
        secret = OSError("/a/path/of/this/machine is broken")
        rig.houses["b"].fails = [secret]
        well, *failed = await asyncio.gather(rig.ask("a"), rig.ask("b"), rig.ask("b"), return_exceptions=True)
        assert well is FinishReason.STOP
        assert all(isinstance(error, Unavailable) for error in failed)
        assert all("the model b cannot be loaded" in str(error) and "/a/path" not in str(error) for error in failed)
        assert any("/a/path" in line for line in rig.lines), "the log says why"
        assert rig.host.models["b"].residency().error
        assert await rig.ask("b") is FinishReason.STOP, "the next one tries again"
        assert rig.host.models["b"].residency().error is None

    living(Rig(300, "a", "b"), story)


def test_a_reason_that_is_meant_for_clients_reaches_them() -> None:
    async def story(rig: Rig) -> None:
        rig.houses["a"].fails = [LoadFailed("its file is not there any more")]
        with pytest.raises(Unavailable, match="its file is not there any more"):
            await rig.ask("a")

    living(Rig(300, "a"), story)


def test_a_model_that_is_larger_than_it_seemed_comes_back_when_there_is_room() -> None:
    async def story(rig: Rig) -> None:
        await rig.ask("a")
        rig.houses["b"].takes = Sizes(180, 0, 10, 10)
        assert await rig.ask("b") is FinishReason.STOP
        assert rig.houses["b"].loads == 2 and rig.houses["a"].service is None
        rig.houses["a"].takes = Sizes(500, 0, 10, 10)
        with pytest.raises(Unavailable, match="a needs 510 B"):
            await rig.ask("a")
        assert rig.host.residence.used <= 250

    living(Rig(250, "a", "b"), story)


def test_deadlines_and_aborts_reach_those_who_wait() -> None:
    async def story(rig: Rig) -> None:
        assert await rig.ask("a", deadline_s=clock.now() + 1.0) is FinishReason.DEADLINE
        asking = asyncio.create_task(rig.ask("b"))
        await clock.sleep(0.1)
        rig.host.abort("r2")
        assert await asking is FinishReason.ABORT

    living(Rig(300, "a", "b"), story)


def test_a_client_that_goes_while_it_waits_leaves_nothing() -> None:
    async def story(rig: Rig) -> None:
        asking = asyncio.create_task(rig.ask("a"))
        await clock.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert rig.host.waiting("a") == (0, 0) and await rig.host.drain(10.0)

    living(Rig(300, "a"), story)


def test_the_queue_before_a_model_is_bounded() -> None:
    async def story(rig: Rig) -> None:
        asking = [asyncio.create_task(rig.ask("a")) for _ in range(2)]
        await clock.sleep(0.1)
        with pytest.raises(Overloaded, match="already wait for the model a"):
            await rig.ask("a")
        assert await asyncio.gather(*asking) == [FinishReason.STOP] * 2

    living(Rig(300, "a", most_waiting=(2, 1000)), story)


def test_a_drain_finishes_what_waits_and_takes_nothing_new() -> None:
    async def story(rig: Rig) -> None:
        asking = asyncio.create_task(rig.ask("a"))
        await clock.sleep(0.1)
        draining = asyncio.create_task(rig.host.drain(30.0))
        await clock.sleep(0.1)
        with pytest.raises(Unavailable, match="draining") as refused:
            await rig.ask("a")
        assert refused.value.retry_after_s is not None and 25 < refused.value.retry_after_s <= 30  # nobody has left yet
        assert await asking is FinishReason.STOP and await draining
        assert rig.host.models["a"].status().state == "draining"

    living(Rig(300, "a"), story)


def test_a_drain_has_an_end() -> None:
    async def story(rig: Rig) -> None:
        asking = asyncio.create_task(rig.ask("a"))
        await clock.sleep(0.1)
        assert not await rig.host.drain(0.5)
        assert await asking is FinishReason.ABORT

    living(Rig(300, "a"), story)


def test_a_replica_that_gave_up_is_loaded_anew_before_anybody_is_sent_to_it() -> None:
    async def story(rig: Rig) -> None:
        await rig.ask("a")
        assert rig.houses["a"].service is not None
        rig.houses["a"].service.state = "failed"
        assert await rig.ask("a") is FinishReason.STOP and rig.houses["a"].loads == 2

    living(Rig(300, "a"), story)


def test_unused_models_go_by_the_clock() -> None:
    async def story(rig: Rig) -> None:
        await rig.ask("a")
        assert rig.host.models["a"].residency().state == "ready"
        await clock.sleep(61.0)
        assert rig.host.models["a"].residency().state == "unloading"
        await clock.sleep(UNLOAD_S)
        assert rig.host.residence.state("a") is State.COLD and rig.host.residence.kept("a") == 5
        assert await rig.ask("a") is FinishReason.STOP
        rig.host.models["a"].keep(0)
        await clock.sleep(UNLOAD_S + 0.1)
        assert rig.houses["a"].service is None

    living(Rig(300, "a", keep_alive_s=60.0), story)


def test_progress_is_shown() -> None:
    async def story(rig: Rig) -> None:
        asking = asyncio.create_task(rig.ask("a"))
        await clock.sleep(LOAD_S * 0.75)
        now = rig.host.models["a"].residency()
        assert (now.state, now.share) == ("loading", 0.5)
        assert rig.host.models["a"].status().waiting == 1
        await asking
        assert rig.host.models["a"].residency().share == 1.0
        assert any("a: ready after 2.00 s" in line for line in rig.lines)

    living(Rig(300, "a"), story)


def test_somebody_may_use_a_model_without_a_request() -> None:
    async def story(rig: Rig) -> None:
        async with rig.host.using("a"):
            assert rig.houses["a"].service is not None and rig.host.residence.in_flight("a") == 1
        assert rig.host.residence.in_flight("a") == 0

    living(Rig(300, "a"), story)
