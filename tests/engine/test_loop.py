"""The engine as a service in virtual time, with the strict executor behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from engine_rig import Recorder, make_request
from null_executor import NullExecutor, reference

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity, Service
from headrace.core.step import StepPlan, StepResult
from headrace.core.types import FinishReason, InvalidRequest, Output, Overloaded, Request, Unavailable
from headrace.engine.loop import FAILURES_IN_A_ROW, Engine
from headrace.engine.policy import BatchView, Share, choose, chunked
from headrace.engine.scheduler import Scheduler

T = TypeVar("T")
CAPACITY = Capacity(blocks=64, block_tokens=4, max_context_tokens=100, vocab=50)


class Bench:
    """An engine that serves in the background while `main` runs, and is empty and sound afterwards."""

    def __init__(
        self, failing: frozenset[int] = frozenset(), executor: NullExecutor | None = None, **more: Any
    ) -> None:
        self.recorder = Recorder()
        self.executor = executor or NullExecutor(CAPACITY, failing=failing)
        settings = EngineSettings(**more)
        self.scheduler = Scheduler(settings, CAPACITY, token_budget=32, observer=self.recorder)
        self.engine = Engine("model", self.scheduler, self.executor)

    def serve(self, main: Coroutine[Any, Any, T]) -> T:
        async def both() -> T:
            serving = asyncio.create_task(self.engine.run())
            try:
                return await main
            finally:
                await clock.sleep(1)
                serving.cancel()
                with suppress(asyncio.CancelledError):
                    await serving
                self.scheduler.check()
                assert self.scheduler.live == self.scheduler.used_blocks == 0
                assert not self.engine._streams

        return clock.run(both(), virtual=True)

    async def collect(self, request: Request) -> list[Output]:
        return [output async for output in self.engine.generate(request)]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_the_engine_is_a_service() -> None:
    bench = Bench()

    async def main(service: Service) -> str:
        return service.status().state

    assert bench.serve(main(bench.engine)) == "ready"


def test_many_streams_at_once_each_get_their_own_tokens() -> None:
    bench = Bench()
    requests = [make_request(str(n), range(n, n + 12), 5 + n % 3) for n in range(20)]

    async def main() -> list[list[Output]]:
        return await asyncio.gather(*map(bench.collect, requests))

    for request, outputs in zip(requests, bench.serve(main()), strict=True):
        assert tokens(outputs) == reference(request, CAPACITY)
        assert [output.finish is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert not bench.executor.known


def test_an_idle_engine_wakes_for_each_request_and_forgets_it() -> None:
    bench = Bench()

    async def main() -> None:
        for number in range(3):
            await bench.collect(make_request(str(number), range(8), 3))
            await clock.sleep(100)
            assert not bench.executor.known
            assert bench.engine.status().running == 0

    bench.serve(main())


def test_closing_a_stream_stops_its_request_before_the_next_plan() -> None:
    bench = Bench()

    async def main() -> None:
        async with aclosing(bench.engine.generate(make_request("a", range(8), 50))) as stream:
            async for _ in stream:
                break
        assert bench.scheduler.live == 0
        await clock.sleep(1)

    bench.serve(main())
    assert [[work.request_id for work in plan.work] for plan in bench.executor.plans] == [["a"], []]
    assert bench.executor.plans[-1].released == ("a",)


def test_cancelling_a_reader_stops_its_request() -> None:
    bench = Bench()

    async def main() -> None:
        reader = asyncio.create_task(bench.collect(make_request("a", range(8), 50)))
        await clock.sleep(0.055)
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
        assert bench.scheduler.live == 0

    bench.serve(main())
    assert len([plan for plan in bench.executor.plans if plan.work]) == 6


def test_abort_by_id_ends_the_stream() -> None:
    bench = Bench()

    async def main() -> list[Output]:
        reader = asyncio.create_task(bench.collect(make_request("a", range(8), 50)))
        await clock.sleep(0.035)
        bench.engine.abort("a")
        bench.engine.abort("a")
        bench.engine.abort("ghost")
        return await reader

    outputs = bench.serve(main())
    assert outputs[-1].finish is FinishReason.ABORT
    assert len(tokens(outputs)) == 3


def test_a_slow_reader_holds_nobody_up() -> None:
    bench = Bench()

    async def slow() -> list[int]:
        read = []
        async for output in bench.engine.generate(make_request("slow", range(8), 20)):
            read += output.token_ids
            await clock.sleep(10)
        return read

    async def main() -> list[int]:
        reader = asyncio.create_task(slow())
        await clock.sleep(0)
        await bench.collect(make_request("quick", range(8), 20))
        assert clock.now() < 1
        return await reader

    assert len(bench.serve(main())) == 20


@pytest.mark.parametrize("deadline_s", [0.0, 0.025, 0.03])
def test_a_deadline_ends_a_stream_at_the_next_plan(deadline_s: float) -> None:
    bench = Bench()

    async def main() -> tuple[list[Output], float]:
        outputs = await bench.collect(make_request("a", range(8), 50, deadline_s=deadline_s))
        return outputs, clock.now()

    outputs, now = bench.serve(main())
    assert outputs[-1].finish is FinishReason.DEADLINE
    assert deadline_s <= now <= deadline_s + 0.011


def test_refusals_come_before_the_first_output() -> None:
    bench = Bench(max_queue_requests=1, max_running=1)

    async def main() -> None:
        with pytest.raises(InvalidRequest):
            await bench.collect(make_request("long", range(200), 5))
        readers = []
        for name in ("runs", "waits"):
            readers.append(asyncio.create_task(bench.collect(make_request(name, range(8), 5))))
            await clock.sleep(0.001)
        with pytest.raises(InvalidRequest):
            await bench.collect(make_request("waits", range(8), 5))
        with pytest.raises(Overloaded) as refused:
            await bench.collect(make_request("more", range(8), 5))
        assert refused.value.retry_after_s >= 1
        assert all(outputs[-1].finish is FinishReason.LENGTH for outputs in await asyncio.gather(*readers))

    bench.serve(main())


def test_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    bench = Bench()

    async def main() -> tuple[bool, list[Output]]:
        reader = asyncio.create_task(bench.collect(make_request("a", range(8), 20)))
        await clock.sleep(0.02)
        draining = asyncio.create_task(bench.engine.drain(10))
        await clock.sleep(0)
        assert bench.engine.status().state == "draining"
        with pytest.raises(Unavailable, match="draining") as refused:
            await bench.collect(make_request("b", range(8), 5))
        assert refused.value.retry_after_s == 1.0  # the one who is here leaves sooner than the drain may take
        return await draining, await reader

    drained, outputs = bench.serve(main())
    assert drained
    assert outputs[-1].finish is FinishReason.LENGTH


def test_drain_aborts_what_does_not_finish_in_time() -> None:
    bench = Bench()

    async def main() -> tuple[bool, list[Output], float]:
        reader = asyncio.create_task(bench.collect(make_request("a", range(8), 90)))
        await clock.sleep(0.02)
        drained = await bench.engine.drain(0.1)
        return drained, await reader, clock.now()

    drained, outputs, now = bench.serve(main())
    assert not drained
    assert outputs[-1].finish is FinishReason.ABORT
    assert now == pytest.approx(0.12)


def test_an_empty_engine_drains_at_once() -> None:
    bench = Bench()
    assert bench.serve(bench.engine.drain(0.0))


def test_one_bad_step_fails_its_requests_and_no_others() -> None:
    bench = Bench(failing=frozenset({2}))

    async def main() -> tuple[list[Output], list[Output]]:
        first = await bench.collect(make_request("first", range(8), 9))
        second = await bench.collect(make_request("second", range(8), 9))
        assert bench.engine.status().state == "ready"
        return first, second

    first, second = bench.serve(main())
    assert first[-1].finish is FinishReason.ERROR
    assert first[-1].error == "the step failed: RuntimeError: the device fell over"
    assert len(tokens(first)) == 2
    assert tokens(second) == reference(make_request("second", range(8), 9), CAPACITY)


def test_failures_with_successes_between_are_survived() -> None:
    bench = Bench(failing=frozenset(range(0, 100, 3)))

    async def main() -> list[list[Output]]:
        ends = [await bench.collect(make_request(str(number), range(8), 2)) for number in range(20)]
        assert bench.engine.status().state == "ready"
        return ends

    reasons = {outputs[-1].finish for outputs in bench.serve(main())}
    assert reasons == {FinishReason.ERROR, FinishReason.LENGTH}


def test_failures_in_a_row_end_the_replica_and_everybody_learns_of_it() -> None:
    bench = Bench(failing=frozenset(range(100)), max_running=1)

    async def main() -> list[list[Output]]:
        requests = [make_request(str(number), range(8), 9) for number in range(FAILURES_IN_A_ROW + 2)]
        outputs = await asyncio.gather(*map(bench.collect, requests))
        with pytest.raises(Unavailable, match="3 steps in a row failed, the last with RuntimeError: the device fell"):
            await bench.collect(make_request("late", range(8), 9))
        assert await bench.engine.drain(1)
        assert bench.engine.status().state == "failed"
        return outputs

    outputs = bench.serve(main())
    assert {each[-1].finish for each in outputs} == {FinishReason.ERROR}
    assert all(each[-1].error and each[-1].usage for each in outputs)


class Liar(NullExecutor):
    """Performs plans and loses the tokens."""

    async def run(self, plan: StepPlan) -> StepResult:
        result = await super().run(plan)
        return StepResult(result.step, {})


def test_an_executor_that_loses_tokens_is_a_failed_step() -> None:
    bench = Bench(executor=Liar(CAPACITY))
    outputs = bench.serve(bench.collect(make_request("a", range(8), 9)))
    assert outputs[-1].finish is FinishReason.ERROR
    assert outputs[-1].error is not None
    assert "drew no token" in outputs[-1].error


def test_stopping_the_loop_ends_every_stream() -> None:
    bench = Bench()

    async def main() -> list[Output]:
        serving = asyncio.create_task(bench.engine.run())
        reader = asyncio.create_task(bench.collect(make_request("a", range(8), 50)))
        await clock.sleep(0.035)
        serving.cancel()
        outputs = await reader
        assert bench.engine.status().state == "failed"
        return outputs

    outputs = clock.run(main(), virtual=True)
    assert outputs[-1].finish is FinishReason.ERROR
    assert outputs[-1].error == "the replica was stopped"


def test_status_tells_what_is_true_now() -> None:
    bench = Bench(max_running=1)

    async def main() -> None:
        readers = [asyncio.create_task(bench.collect(make_request(str(n), range(8), 5))) for n in range(3)]
        await clock.sleep(0.025)
        status = bench.engine.status()
        assert (status.running, status.waiting, status.waiting_tokens) == (1, 2, 16)
        assert status.used_blocks == 3
        assert status.last_progress_s == 0.02
        await asyncio.gather(*readers)

    bench.serve(main())


def test_an_executor_that_never_waits_does_not_keep_the_loop_to_itself() -> None:
    bench = Bench(executor=NullExecutor(CAPACITY, step_s=0.0))

    async def main() -> int:
        reader = asyncio.create_task(bench.collect(make_request("a", range(8), 90)))
        turns = 0
        while not reader.done():
            await clock.sleep(0)
            turns += 1
        return turns

    assert bench.serve(main()) > 90


def test_a_policy_that_breaks_ends_the_replica_and_says_so() -> None:
    def broken(batch: BatchView) -> Generator[Share, int, None]:
        assert batch.now <= 0.02, "on purpose"
        return chunked(batch)

    policies = replace(choose(EngineSettings()), batch=broken)
    scheduler = Scheduler(EngineSettings(), CAPACITY, token_budget=32, observer=Recorder(), policies=policies)
    engine = Engine("model", scheduler, NullExecutor(CAPACITY))

    async def main() -> list[Output]:
        serving = asyncio.create_task(engine.run())
        outputs = [output async for output in engine.generate(make_request("a", range(8), 50))]
        with pytest.raises(AssertionError, match="on purpose"):
            await serving
        return outputs

    outputs = clock.run(main(), virtual=True)
    assert (outputs[-1].error or "").startswith("the replica stopped: AssertionError")
    assert outputs[-1].finish is FinishReason.ERROR
    assert scheduler.live == 0
