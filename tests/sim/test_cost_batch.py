import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.step import Beat, Decode, StepPlan, Work
from headrace.sim.cost.batch import (
    Batch,
    Line,
    StepCost,
    batch_of,
    batch_of_plan,
    cut_of_plan,
    estimate_cut,
    trace_line,
)

ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8)


def pairs(start: int, tokens: int, window: int) -> int:
    return sum(min(position + 1, window) for position in range(start, start + tokens))


def keys(start: int, tokens: int, window: int) -> int:
    touched = {k for q in range(start, start + tokens) for k in range(max(0, q - window + 1), q + 1)}
    return len(touched)


@given(ROWS, st.integers(1, 50))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_sums_equal_a_count_of_every_query_and_key(rows: list[tuple[int, int]], window: int) -> None:
    batch = batch_of(rows, 0, (window,))
    for spans, edge in ((batch.full, 10**9), (batch.windowed[0], window)):
        prefill = [row for row in rows if row[1] > 1]
        assert spans.pairs == sum(pairs(*row, edge) for row in prefill)
        assert spans.prefill_context == sum(keys(*row, edge) for row in prefill)
        assert spans.decode_context == sum(keys(*row, edge) for row in rows if row[1] == 1)
    assert batch.tokens == sum(tokens for _, tokens in rows)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 30), st.integers(1, 50))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_advancing_equals_folding_the_later_rows(starts: list[int], steps: int, window: int) -> None:
    batch = batch_of([(start, 1) for start in starts], len(starts), (window,))
    room = batch.windowed[0].room
    steps = min(steps, 30 if room is None else room)
    later = batch_of([(start + steps, 1) for start in starts], len(starts), (window,))
    moved = batch.advanced(steps)
    assert moved.full == later.full
    assert moved.windowed[0].decode_context == later.windowed[0].decode_context


def test_a_plan_folds_like_its_rows() -> None:
    plan = StepPlan(0, (Work("a", 7, 1, sample=True), Work("b", 0, 5, sample=False)))
    assert batch_of_plan(plan, (4,)) == batch_of([(7, 1), (0, 5)], 1, (4,))


def test_layers_that_compute_the_same_rows_are_one_batch() -> None:
    a, p, q = (
        Work("a", 7, 1, sample=True),
        Work("p", 4, 8, sample=False, layers=(2, 4)),
        Work("q", 0, 3, True, layers=(6, 8)),
    )
    cut = cut_of_plan(StepPlan(0, (a, p, q)), 8)
    assert cut == (
        (0.5, batch_of([(7, 1)], 0)),
        (0.25, batch_of([(7, 1), (4, 8)], 0)),
        (0.25, batch_of([(7, 1), (0, 3)], 2)),
    )


def test_a_beat_is_in_all_layers() -> None:
    beat = Beat(3, (Decode("a", 4), Decode("b", 9)), 19, {}, longest_tokens=12)
    plan = StepPlan(0, (Work("p", 4, 8, sample=False, layers=(0, 2)),), beat=beat)
    decodes = batch_of([(7, 1), (12, 1)], 2)
    assert cut_of_plan(plan, 8) == ((0.25, batch_of([(4, 8), (7, 1), (12, 1)], 0)), (0.75, decodes))


class Rows:
    """Three seconds for the host, one for logits, one for every token in all layers."""

    def estimate(self, batch: Batch) -> StepCost:
        return StepCost(
            3.0 + (batch.sampled > 0) + batch.tokens, compute_s=batch.tokens, extrapolated=batch.tokens > 10
        )

    def line(self, batch: Batch, steps: int) -> Line:
        return trace_line(self, batch, steps)


@given(st.integers(1, 9), st.integers(0, 7), st.integers(1, 8), st.integers(0, 3), st.booleans())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_tokens_cost_by_the_layers_they_pass_and_the_rest_once(
    tokens: int, first: int, more: int, decodes: int, cut: bool
) -> None:
    last = min(8, first + more)
    works = [Work(str(at), 5, 1, sample=True) for at in range(decodes)]
    works.append(Work("p", 0, tokens, sample=last == 8, layers=(first, last) if cut else None))
    price = estimate_cut(Rows(), cut_of_plan(StepPlan(0, tuple(works)), 8))
    computed = decodes + tokens * ((last - first) / 8 if cut else 1)
    assert price.compute_s == pytest.approx(computed)
    assert price.seconds == pytest.approx(computed + 3 + (decodes > 0 or last == 8))
    assert price.extrapolated == (decodes + tokens > 10)


def test_the_binding_term_is_the_largest() -> None:
    assert StepCost(6.0, 1.0, 2.0, 3.0, 0.0).bound == "network"
    assert StepCost(1.0).bound == "compute"


@given(st.floats(0, 10), st.floats(0, 1), st.integers(1, 200), st.floats(0, 500))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_a_line_inverts_its_own_sum(first: float, slope: float, steps: int, budget: float) -> None:
    line = Line(first, slope, steps)
    done = line.steps_within(budget)
    assert line.total_s(done) <= budget
    assert done == steps or line.total_s(done + 1) > budget
    assert line.total_s(done) == pytest.approx(sum(first + i * slope for i in range(done)))


class Kinked:
    """Costs max(context, 2 context - kink): convex, with one corner."""

    def __init__(self, kink: float) -> None:
        self.kink = kink

    def estimate(self, batch: Batch) -> StepCost:
        context = batch.full.decode_context
        return StepCost(max(context, 2 * context - self.kink))

    def line(self, batch: Batch, steps: int) -> Line:
        return trace_line(self, batch, steps)


@given(st.integers(0, 300), st.integers(1, 400), st.floats(0, 500))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_a_traced_line_agrees_with_stepping_around_a_corner(start: int, steps: int, kink: float) -> None:
    model, batch, done = Kinked(kink), batch_of([(start, 1)], 1), 0
    while done < steps:
        line = model.line(batch.advanced(done), steps - done)
        assert 1 <= line.steps <= steps - done
        for i in range(line.steps):
            stepped = model.estimate(batch.advanced(done + i)).seconds
            assert line.first_s + i * line.slope_s == pytest.approx(stepped, rel=1e-9)
        done += line.steps


def test_a_line_stops_where_a_row_fills_its_window() -> None:
    batch = batch_of([(5, 1), (9, 1)], 2, (12,))
    assert Kinked(1e9).line(batch, 100).steps == 3  # contexts 10, 11, 12 of the second row, the third still inside


@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_a_beat_folds_as_its_rows_do(starts: list[int], steps: int, chunk: int) -> None:
    others = (Work("p", 3, chunk + 1, True),)
    number = 7
    rows = tuple(Decode(str(at), start - number) for at, start in enumerate(starts))
    beat = Beat(number, rows, sum(starts), {}, longest_tokens=max(starts))
    plan = StepPlan(0, others, beat=beat)
    assert batch_of_plan(plan) == batch_of([*((start, 1) for start in starts), (3, chunk + 1)], len(starts) + 1)
    decodes = batch_of([(start, 1) for start in starts], len(starts))
    assert decodes.advanced(steps) == batch_of([(start + steps, 1) for start in starts], len(starts))
