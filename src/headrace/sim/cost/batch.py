"""The joint between a step and its price: a `Batch` is what a cost model needs to know of a step, as sums.

A `StepPlan` of any size folds into a handful of numbers, and every cost is a sum of maxima of functions affine in
them. So a step costs a few multiply-adds, and a run of decode steps a closed form (`Line`). Values only; the models
that price them live beside this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import mul
from typing import NamedTuple, Protocol

from headrace.core.shape import ModelShape
from headrace.core.step import StepPlan, Work
from headrace.core.types import HeadraceError


class Extrapolated(HeadraceError):
    """A measured model was asked about a step far from everything it has seen."""


class Spans(NamedTuple):
    """Attention work of one step in one layer, of the layers that share an attention window.

    A row computes `tokens` queries at positions start, start+1, ...; the query at position i meets min(i+1, window)
    keys. A row of one token is a decode, any other a prefill:

                     keys                    pairs            = shaded area, over prefill rows
        start      |##########|.....         prefill_context  = keys read, over prefill rows
          |        |###########|....         decode_context   = keys read (and pairs), over decode rows
        start+     |############|...
        tokens
    """

    pairs: float = 0
    prefill_context: float = 0
    decode_context: float = 0
    growing: int = 0  # decode rows that will read one more key in their next step
    room: int | None = None  # steps until the first of them reaches its window; None: never


class Batch(NamedTuple):
    """One step as sums over its rows. All fields are additive over rows but `longest` and `room` of the spans.

    `windowed` has one entry per distinct finite attention window of the model, smallest first.
    """

    rows: int = 0
    tokens: float = 0  # computed in this step; fractional in a mean of steps
    sampled: int = 0  # rows whose logits are needed
    decodes: float = 0  # rows of one token: as many tokens
    prefill_reach: float = 0  # sum of tokens * (start + tokens) over the other rows: pairs without the causal mask
    full: Spans = Spans()
    windowed: tuple[Spans, ...] = ()
    longest: float = 0  # keys of the decode row that reads most

    @property
    def prefill_tokens(self) -> float:
        return self.tokens - self.decodes

    def advanced(self, steps: float) -> Batch:
        """The batch after `steps` more decode steps of the same rows, none of which passes its window's edge. Half a
        step is a mean of two."""
        spans = tuple(_advanced(span, steps) for span in self.windowed)
        longest = self.longest + steps if self.longest else 0
        rows, tokens, sampled, decodes, reach, full, *_ = self
        return Batch(rows, tokens, sampled, decodes, reach, _advanced(full, steps), spans, longest)


def _advanced(spans: Spans, steps: float) -> Spans:
    pairs, prefill, decode, growing, room = spans
    return Spans(pairs, prefill, decode + growing * steps, growing, None if room is None else int(room - steps))


def windows_of(shape: ModelShape) -> tuple[int, ...]:
    """The distinct finite attention windows of a model, smallest first: the order of `Batch.windowed`."""
    return tuple(sorted({window for window in shape.windows if window is not None}))


Row = tuple[int, int]  # (start, tokens): tokens in the KV already, tokens to compute


def batch_of(rows: Iterable[Row], sampled: int, windows: tuple[int, ...] = ()) -> Batch:
    """Fold (start, tokens) rows into sums. O(rows x windows)."""
    count = tokens = decodes = pairs = prefill = decode = reach = longest = 0
    listed = list(rows)
    for start, new in listed:
        count += 1
        tokens += new
        if new == 1:
            decodes += 1
            decode += start + 1
            longest = max(longest, start + 1)
        else:
            pairs += new * start + new * (new + 1) // 2
            prefill += start + new
            reach += new * (start + new)
    full = Spans(pairs, prefill, decode, growing=decodes)
    windowed = tuple(_windowed(listed, window) for window in windows)
    return Batch(count, tokens, sampled, decodes, reach, full, windowed, longest)


def _windowed(rows: list[Row], window: int) -> Spans:
    pairs = prefill = decode = growing = 0
    room: int | None = None
    for start, new in rows:
        if new == 1:
            decode += min(start + 1, window)
            if start + 1 < window:
                growing += 1
                left = window - start - 1
                room = left if room is None else min(room, left)
        else:
            short = min(max(window - start, 0), new)  # queries that still see everything before them
            pairs += short * start + short * (short + 1) // 2 + (new - short) * window
            prefill += min(start + new, window + new - 1)
    return Spans(pairs, prefill, decode, growing, room)


def batch_of_plan(plan: StepPlan, windows: tuple[int, ...] = ()) -> Batch:
    """Fold a plan, as if all its work went through all layers. The beat is a sum already, unless there are windows to
    look through."""
    if plan.beat is None or windows:
        return _of_work(plan.work, windows)
    rows, longest = len(plan.beat.rows), plan.beat.longest_tokens + 1
    context = plan.beat.context_tokens + rows
    if not plan.others:
        return Batch(rows, rows, rows, rows, 0, Spans(0, 0, context, rows), (), longest)
    others = _of_work(plan.others, ())
    full = others.full
    return Batch(
        rows=others.rows + rows,
        tokens=others.tokens + rows,
        sampled=others.sampled + rows,
        decodes=others.decodes + rows,
        prefill_reach=others.prefill_reach,
        full=Spans(full.pairs, full.prefill_context, full.decode_context + context, full.growing + rows),
        longest=max(others.longest, longest),
    )


def _of_work(works: Sequence[Work], windows: tuple[int, ...]) -> Batch:
    sampled = sum(len(work.drafts) + 1 for work in works if work.sample)
    return batch_of([(work.start, work.tokens) for work in works], sampled, windows)


Cut = tuple[tuple[float, Batch], ...]  # (share of the layers, what they compute); who samples is in one of them


def cut_of_plan(plan: StepPlan, layers: int, windows: tuple[int, ...] = ()) -> Cut:
    """A plan of which some work goes through some of the model's `layers` only: one batch for all layers that compute
    the same rows. Logits are those of the last layer's rows.

        a, b   .=====.=====.=====.      (2/3, a b), (1/3, a b p)
        p            '====='
    """
    edges = sorted({0, layers, *(edge for work in plan.others for edge in work.layers or ())})
    shares: dict[tuple[Work, ...], float] = {}
    rows: tuple[Work, ...] = ()
    for first, last in pairwise(edges):
        rows = tuple(work for work in plan.others if work.layers is None or work.layers[0] <= first < work.layers[1])
        shares[rows] = shares.get(rows, 0.0) + (last - first) / layers
    batches = {some: batch_of_plan(plan._replace(others=some), windows) for some in shares}
    return tuple(
        (share, batches[some] if some == rows else batches[some]._replace(sampled=0)) for some, share in shares.items()
    )


class StepCost(NamedTuple):
    """The price of one step on all devices of a replica together.

    The terms add up to `seconds`: every operator's time goes to the resource that bounds it. Work that a faster
    resource hides costs nothing here; `flops` and the bytes say how much of it there is.
    """

    seconds: float
    compute_s: float = 0.0
    memory_s: float = 0.0
    network_s: float = 0.0
    overhead_s: float = 0.0  # launching kernels, and the host's own work between steps
    joules: float = 0.0  # 0 when the power of the device is unknown
    flops: float = 0.0
    memory_bytes: float = 0.0
    network_bytes: float = 0.0
    copy_s: float = 0.0  # copies between the tiers, as far as no work hides them
    copied_bytes: float = 0.0  # by every device
    extrapolated: bool = False  # a fitted model left the range it was fitted on

    @property
    def bound(self) -> str:
        """The largest term: 'compute', 'memory', 'network' or 'overhead'."""
        terms = (self.compute_s, self.memory_s, self.network_s, self.overhead_s)
        return ("compute", "memory", "network", "overhead")[terms.index(max(terms))]


class Line(NamedTuple):
    """Consecutive decode steps of one batch: step i takes first_s + i * slope_s seconds, for i < steps."""

    first_s: float
    slope_s: float
    steps: int

    def total_s(self, steps: int) -> float:
        """Seconds of the first `steps` steps, at most `self.steps` of them."""
        return steps * self.first_s + self.slope_s * (steps * (steps - 1) / 2)

    def steps_within(self, seconds: float) -> int:
        """How many whole steps, at most `self.steps`, finish within `seconds`."""
        low, high = 0, self.steps
        while low < high:
            middle = (low + high + 1) // 2
            if self.total_s(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


class CostModel(Protocol):
    """What a step costs. Pure: the same batch always costs the same."""

    def estimate(self, batch: Batch) -> StepCost:
        """The price of one step. Raises Extrapolated where the model was told to refuse."""
        ...

    def line(self, batch: Batch, steps: int) -> Line:
        """The batch (decodes only) and its next `steps` - 1 steps, or as many as stay on one straight line."""
        ...


def estimate_cut(model: CostModel, cut: Cut) -> StepCost:
    """The price of a step whose layers compute different rows: the mean of steps that compute the same rows in all
    layers, weighted by layers, and the logits once. What the host takes is in every price, and so once in the mean."""
    prices = [(share, model.estimate(batch._replace(sampled=0))) for share, batch in cut]
    for _, batch in cut:
        if batch.sampled:
            prices += [(1.0, model.estimate(batch)), (-1.0, model.estimate(batch._replace(sampled=0)))]
    shares = [share for share, _ in prices]
    *terms, extrapolated = zip(*(cost for _, cost in prices), strict=True)
    return StepCost._make([*(sum(map(mul, shares, term)) for term in terms), any(extrapolated)])


_ROUNDING = 1e-12


def trace_line(model: CostModel, batch: Batch, steps: int) -> Line:
    """`CostModel.line` of any model whose seconds are convex along a run of decode steps.

    A convex function that meets its own tangent at 0 again at k is that tangent in between: one comparison proves the
    whole stretch, and halving finds one that holds.
    """
    rooms = [spans.room for spans in batch.windowed if spans.room is not None]
    first = model.estimate(batch).seconds
    last = min([steps - 1, *rooms])
    if last < 1:
        return Line(first, 0.0, 1)
    slope = model.estimate(batch.advanced(1)).seconds - first
    while last > 1:
        end = model.estimate(batch.advanced(last)).seconds
        if abs(end - first - last * slope) <= _ROUNDING * last * end:
            return Line(first, (end - first) / last, last + 1)
        last //= 2
    return Line(first, slope, last + 1)
