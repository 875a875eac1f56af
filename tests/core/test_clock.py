"""Virtual time: order, jumps, deadlock, and that wall time cannot get in."""

import asyncio
import random
import signal

import pytest

from headrace.core import clock


def test_an_hour_passes_at_once_and_lands_exactly() -> None:
    async def main() -> float:
        await clock.sleep(3600.1)
        return clock.now()

    assert clock.run(main(), virtual=True) == 3600.1


def test_equal_deadlines_fire_in_the_order_they_were_set() -> None:
    fired: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in range(100):
            loop.call_at(5.0, fired.append, number)
        await clock.sleep(6)

    clock.run(main(), virtual=True)
    assert fired == list(range(100))


def test_timers_fire_by_deadline_then_creation() -> None:
    rng = random.Random(1)
    set_timers = [(rng.choice([1.0, 2.0, 2.0000001, 3.0]), number) for number in range(500)]
    fired: list[tuple[float, int]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for when, number in set_timers:
            loop.call_at(when, lambda pair: fired.append(pair), (when, number))
        await clock.sleep(10)

    clock.run(main(), virtual=True)
    assert fired == sorted(set_timers)


@pytest.mark.parametrize("start", [0.0, 1e6, 1e12])
def test_time_advances_however_large_it_is(start: float) -> None:
    async def main() -> float:
        await clock.sleep(start)
        for _ in range(10):
            await clock.sleep(0.25)
        return clock.now()

    assert clock.run(main(), virtual=True) == pytest.approx(start + 2.5)


def test_asyncio_timeouts_and_queues_work() -> None:
    async def main() -> tuple[float, int]:
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def produce() -> None:
            await clock.sleep(2)
            queue.put_nowait(7)

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await queue.get()
            got = await queue.get()
        return clock.now(), got

    assert clock.run(main(), virtual=True) == (2.0, 7)


def test_deadlock_is_reported_with_the_task_that_waits() -> None:
    async def waits_forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(clock.Deadlock, match="waits_forever"):
        clock.run(waits_forever(), virtual=True)


def test_time_goes_on_piece_by_piece() -> None:
    rung: list[float] = []

    async def ring() -> None:
        while True:
            await clock.sleep(1.0)
            rung.append(clock.now())

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(ring())

    with clock.Timeline() as one, clock.Timeline() as other:
        one.run(begin())
        one.run(clock.sleep_until(2.5))
        assert rung == [1.0, 2.0]
        other.run(clock.sleep_until(9.0))
        one.run(clock.sleep_until(4.5))
    assert rung == [1.0, 2.0, 3.0, 4.0]


def test_an_interrupt_ends_virtual_time() -> None:
    async def endless() -> None:
        while True:
            await clock.sleep(1.0)
            if clock.now() == 5.0:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            clock.run(endless(), virtual=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="threads are refused"):
        clock.run(main(), virtual=True)


def test_wall_time_is_reproducible_under_virtual_time() -> None:
    async def main() -> float:
        await clock.sleep(10)
        return clock.wall()

    assert clock.run(main(), virtual=True) == clock.run(main(), virtual=True) == 1_700_000_010.0


def test_sleep_until_reads_the_very_number() -> None:
    async def main() -> list[float]:
        read = []
        for when_s in (0.1, 0.1 + 0.2, 4000.3, 1e9 + 1 / 3, 5.0):
            await clock.sleep_until(when_s)
            read.append(clock.now())
        return read

    assert clock.run(main(), virtual=True) == [0.1, 0.1 + 0.2, 4000.3, 1e9 + 1 / 3, 1e9 + 1 / 3]


def test_who_sleeps_alone_does_not_go_round_the_loop() -> None:
    async def main() -> tuple[list[float], int]:
        rounds = 0

        def go_round() -> None:
            nonlocal rounds
            rounds += 1
            loop.call_soon(go_round)

        loop, read = asyncio.get_running_loop(), []
        for when_s in (1.0, 1.5, 1.5):
            assert clock.jump(when_s)
            await clock.sleep_until(when_s)
            read.append(clock.now())
        go_round()
        assert not clock.jump(2.0), "somebody is ready"
        return read, rounds

    assert clock.run(main(), virtual=True) == ([1.0, 1.5, 1.5], 1)
    assert clock.run(_jumps()) is False


async def _jumps() -> bool:
    return clock.jump(clock.now())


def test_who_sleeps_lets_others_go_first_whose_time_comes_no_later() -> None:
    told: list[str] = []

    async def other() -> None:
        for _ in range(3):
            await clock.sleep(1.0)
            told.append(f"other {clock.now()}")

    async def main() -> None:
        task = asyncio.create_task(other())
        await clock.sleep(0)
        asyncio.get_running_loop().call_at(2.0, told.append, "timer")
        await clock.sleep_until(2.0)
        told.append("main 2.0")
        await clock.sleep(0)
        await clock.sleep_until(2.5)
        told.append("main 2.5")
        await task

    clock.run(main(), virtual=True)
    assert told == ["other 1.0", "timer", "main 2.0", "other 2.0", "main 2.5", "other 3.0"]


def test_cancelling_reaches_a_task_that_sleeps_for_ever() -> None:
    async def for_ever() -> None:
        while True:
            await clock.sleep(1.0)

    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100.5):
                await for_ever()
        return clock.now()

    assert clock.run(main(), virtual=True) == 100.5


def test_time_that_is_spent_makes_timers_late() -> None:
    async def main() -> tuple[float, float]:
        late = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_at(1.0, lambda: late.set_result(clock.now()))
        clock.spend(3.5)
        return await late, clock.now()

    assert clock.run(main(), virtual=True) == (3.5, 3.5)
    with pytest.raises(RuntimeError, match="only virtual time"):
        clock.run(main())
