"""Lines, deadlines and bounds."""

from __future__ import annotations

import random

import pytest
from engine_rig import make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.types import Overloaded
from headrace.engine.progress import LEGAL, Progress, State
from headrace.engine.queue import Bounds, Deadlines, Line, Lines


def progress(number: int, **more: object) -> Progress:
    one = Progress(make_request(str(number), range(10), **more), 100, number, 0.0)  # type: ignore[arg-type]
    one.order = (one.request.arrival_s, number)
    return one


@pytest.mark.parametrize("start", State)
@pytest.mark.parametrize("end", State)
def test_only_legal_transitions_happen(start: State, end: State) -> None:
    lines, one = Lines(4), progress(1)
    lines.enter(one)
    if start is not State.WAITING:
        lines.move(one, start)
    if end in LEGAL[start]:
        lines.move(one, end)
        lines.check()
        left = (start in (State.PREFILLING, State.DECODING)) and end in (State.WAITING, State.FINISHED)
        assert lines.released == (["1"] if left else [])
    else:
        with pytest.raises((AssertionError, KeyError)):
            lines.move(one, end)


def test_lines_keep_the_order_whatever_the_order_of_arrival() -> None:
    lines, rng = Lines(4), random.Random(0)
    for number in range(50):
        lines.enter(progress(number, arrival_s=float(rng.randrange(10))))
    for one in rng.sample(lines.waiting.members, 30):
        lines.move(one, rng.choice([State.PREFILLING, State.DECODING]))
        lines.check()
    orders = [one.order for one in lines.running()]
    assert orders == sorted(orders)
    lines.reorder(lambda one: -one.request.arrival_s)
    lines.check()
    assert lines.waiting.members[0].request.arrival_s >= lines.waiting.members[-1].request.arrival_s


@pytest.mark.parametrize("seed", range(20))
def test_a_snapshot_stays_what_it_was(seed: int) -> None:
    """A line against a sorted list, and every snapshot against a copy."""
    rng, line, shown = random.Random(seed), Line(), []
    model: list[Progress] = []
    for number in range(400):
        if rng.random() < 0.55:
            one = progress(number, arrival_s=float(number - rng.choice([0, 0, 0, 30])))
            line.add(one)
            model = sorted([*model, one], key=lambda some: some.order)
        elif model:
            one = model.pop(0 if rng.random() < 0.8 else rng.randrange(len(model)))
            line.remove(one)
        if rng.random() < 0.2:
            shown.append((line.snapshot(), tuple(model)))
        assert len(line) == len(model)
        assert not model or line.first is model[0]
    line.check()
    assert line.members == model
    for snapshot, some in shown:
        assert (len(snapshot), tuple(snapshot), tuple(snapshot[:3])) == (len(some), some, some[:3])
        assert not some or snapshot[-1] is some[-1]


def test_a_long_line_is_left_and_looked_at_in_constant_time() -> None:
    line = Line()
    some = [progress(number) for number in range(5000)]
    for one in some:
        line.add(one)
    moved = 0
    for one in some:
        before = line._all
        assert line.snapshot()[0] is one
        line.remove(one)
        moved += len(line._all) if line._all is not before else 0
    assert moved < 2 * len(some)


def test_deadlines_come_in_order_and_do_not_pile_up() -> None:
    lines, deadlines = Lines(4), Deadlines()
    for number in range(1000):
        one = progress(number, deadline_s=1e9 - number)
        lines.enter(one)
        deadlines.add(one)
        lines.move(one, State.FINISHED)
        deadlines.next(len(lines.live))
        assert len(deadlines._heap) <= 17
    soon, late = progress(2000, deadline_s=1.0), progress(2001, deadline_s=2.0)
    for one in (late, soon, progress(2002)):
        lines.enter(one)
        deadlines.add(one)
    assert deadlines.next(3) is soon
    lines.move(soon, State.FINISHED)
    assert deadlines.next(2) is late


def test_retry_after_follows_the_measured_rate() -> None:
    bounds, newcomer = Bounds(10, 1000), 100
    bounds.check_room(newcomer, 9, 900, 0.0)
    with pytest.raises(Overloaded) as unmeasured:
        bounds.check_room(newcomer, 10, 900, 0.0)
    assert unmeasured.value.retry_after_s == 1.0
    for second in range(8):
        bounds.left(10, 3.0 * second)  # 10 tokens every 3 s
    with pytest.raises(Overloaded, match="10 requests with 950 prompt tokens are waiting; try again in 15 s") as full:
        bounds.check_room(newcomer, 10, 950, 24.0)
    assert full.value.retry_after_s == pytest.approx(50 / 80 * 24.0)
    with pytest.raises(Overloaded) as hopeless:
        bounds.check_room(newcomer, 10, 10**9, 24.0)
    assert hopeless.value.retry_after_s == 600.0


def test_an_empty_queue_takes_anybody() -> None:
    Bounds(1, 1).check_room(100, 0, 0, 0.0)


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=8), st.floats(0.01, 10))
@settings(max_examples=60, derandomize=True)
def test_time_without_a_queue_does_not_slow_its_measured_rate(pauses_s: list[float], pace_s: float) -> None:
    bounds, now = Bounds(2, 10**9), 0.0
    for pause_s in pauses_s:
        now += pause_s
        for waiting in range(2):
            bounds.check_room(10, waiting, 10 * waiting, now)
        for _ in range(2):
            now += pace_s
            bounds.left(10, now)
    bounds.check_room(10, 0, 0, now)
    assert bounds.drain_s(40, 0, now) <= max(1.0, 40 * pace_s) * 1.001
