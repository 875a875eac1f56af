"""Takes the steps of an executor apart without looking inside: what a step costs less when a part of it is left out.

    sampled - not sampled                                  = the output head and drawing a token
    at a context - at the start of the context             = attention
    its first layer and the others in two steps - in one   = preparing a step
    what is left                                           = the layers: everything in them that no context makes longer

Every request has blocks of its own with KV that was really computed; steps read them as after a prefix hit. What the
engine does between two steps is measured with an engine. Owns the executor's requests while it measures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from random import Random
from statistics import median

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity, Executor
from headrace.core.step import Admitted, Block, StepPlan, Work
from headrace.core.types import HeadraceError, Request, RequestId, Sampling, Tokens
from headrace.sim.measure import Session, probing
from headrace.sim.roofline.limits import ATTENTION, HEAD, LAYERS

PREPARING, BETWEEN = "preparing the step", "between steps"
PARTS = (LAYERS, ATTENTION, HEAD, PREPARING, BETWEEN)

_VISIT = ("bare",) * 3 + ("split",) * 3 + ("whole",) * 4  # the steps of one visit; the first of a kind is not counted
_DRAWN = _VISIT.count("whole")
_CHUNK = 512  # tokens of a step that fills KV
_FIRST_STEP = 1 << 40  # an engine that was there before numbered its steps from 0
_GREEDY = Sampling(temperature=0.0)

Point = tuple[int, int]  # (requests side by side, tokens in the KV of each)
Heard = Callable[[str, float], None]
Kinds = Mapping[str, list[float]]  # seconds of steps by kind


class TooLarge(HeadraceError):
    """No step that was asked for fits into the KV memory."""


@dataclass(frozen=True, slots=True)
class Reached:
    """What a decode step took."""

    rows: int
    context: int
    parts: Mapping[str, float]  # seconds, by the names of PARTS; differences below 0 count as 0

    @property
    def seconds(self) -> float:
        """From one plan to the next."""
        return sum(self.parts.values())


def fitting(points: Sequence[Point], capacity: Capacity) -> list[Point]:
    """The points that can be measured, contexts rounded down to whole blocks: those whose KV fits beside that of the
    points before them, each request its own."""
    size, kept = capacity.block_tokens, list[Point]()
    for rows, context in points:
        point = (rows, context // size * size)
        fits = point[1] + len(_VISIT) <= capacity.max_context_tokens
        if fits and point not in kept and _blocks([*kept, point], size) <= capacity.blocks:
            kept.append(point)
    return kept


def _blocks(points: Sequence[Point], size: int) -> int:
    """Blocks of documents as long as the points need, and of what a visit adds to each."""
    return sum(length // size + -(-len(_VISIT) // size) for length in lengths(points))


def lengths(points: Sequence[Point]) -> list[int]:
    """Tokens of every document: number i is as long as the longest context of a point with more than i requests."""
    most = max((rows for rows, _ in points), default=0)
    return [max(context for rows, context in points if rows > at) for at in range(most)]


@dataclass(slots=True)
class _Row:
    """One request, its block table to be, and how far it is."""

    request: Request
    table: tuple[Block, ...]
    start: int = 0

    def work(self, tokens: int, sample: bool, size: int, layers: tuple[int, int] | None) -> Work:
        touched = slice(-(-self.start // size), -(-(self.start + tokens) // size))
        new = () if layers and layers[0] else self.table[touched]
        return Work(self.request.id, self.start, tokens, sample, new, (), layers)


class Bench:
    """Drives one executor plan by plan. Document i has its own blocks, filled once, and request i of a visit begins
    with it and goes on in blocks of its own."""

    def __init__(self, executor: Executor, documents: Sequence[int], seed: int = 0) -> None:
        self._executor = executor
        self._capacity = executor.capacity
        self._random = Random(seed)
        self._steps, self._names = count(_FIRST_STEP), count()
        self._known: list[RequestId] = []  # to the executor, and of no more use
        self._documents = [self._draw(length) for length in documents]
        blocks, size = count(), self._capacity.block_tokens
        self._filled = [tuple(islice(blocks, length // size)) for length in documents]
        self._own = [tuple(islice(blocks, -(-len(_VISIT) // size))) for _ in documents]

    async def fill(self, heard: Heard) -> None:
        """Compute the KV of all documents."""
        total, done = sum(map(len, self._documents)), 0
        for document, blocks, own in zip(self._documents, self._filled, self._own, strict=True):
            row = self._row((*document, *self._draw(1)), blocks + own)
            while row.start < len(document):
                tokens = min(_CHUNK, len(document) - row.start)
                await self._run([row], tokens, admitted=row.start == 0)
                row.start += tokens
                done += tokens
                heard("fill the KV that steps read", done / total)
            self._known += [row.request.id] if document else []

    async def visit(self, rows: int, context: int) -> Kinds:
        """Steps of `rows` requests at `context`: "bare" ones do not sample, "split" ones go through the first layer and
        then, in a second step, through the others, "whole" ones sample."""
        before = context // self._capacity.block_tokens
        side_by_side = [
            self._row((*self._documents[at][:context], *self._draw(len(_VISIT) - _DRAWN + 1)),
                      self._filled[at][:before] + self._own[at], context)
            for at in range(rows)
        ]  # fmt: skip
        took: dict[str, list[float]] = defaultdict(list)
        for step, kind in enumerate(_VISIT):
            seconds = await self._one(side_by_side, kind, step == 0)
            if step and kind == _VISIT[step - 1]:
                took[kind].append(seconds)
            for row in side_by_side:
                row.start += 1
        self._known += [row.request.id for row in side_by_side]
        return took

    async def _one(self, rows: Sequence[_Row], kind: str, admitted: bool) -> float:
        layers = self._capacity.layers
        if kind == "split" and layers > 1:
            return await self._run(rows, 1, layers=(0, 1)) + await self._run(rows, 1, layers=(1, layers))
        return await self._run(rows, 1, sample=kind == "whole", admitted=admitted)

    async def prefill(self, tokens: int) -> float:
        """Seconds of one step that computes a prompt so long and samples. Writes to the blocks from 0 on, so only
        before `fill`."""
        row = self._row(self._draw(tokens), tuple(range(-(-tokens // self._capacity.block_tokens))))
        seconds = await self._run([row], tokens, sample=True, admitted=True)
        self._known.append(row.request.id)
        return seconds

    async def forget(self) -> None:
        """The executor knows none of the requests any more."""
        await self._run((), 0)

    async def _run(
        self,
        rows: Sequence[_Row],
        tokens: int,
        *,
        sample: bool = False,
        admitted: bool = False,
        layers: tuple[int, int] | None = None,
    ) -> float:
        """Seconds of one step that computes so many tokens of every row."""
        size = self._capacity.block_tokens
        works = tuple(row.work(tokens, sample, size, layers) for row in rows)
        new = [Admitted(row.request, (), row.table[: row.start // size], row.start) for row in rows if admitted]
        plan = StepPlan(next(self._steps), works, tuple(new), tuple(self._known))
        self._known.clear()
        begin_s = clock.now()
        await self._executor.run(plan)
        return clock.now() - begin_s

    def _row(self, ids: tuple[int, ...], table: tuple[Block, ...], start: int = 0) -> _Row:
        request = Request(f"roofline {next(self._names)}", (Tokens(ids),), 0.0, _DRAWN, _GREEDY)
        return _Row(request, table, start)

    def _draw(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self._capacity.vocab), k=tokens))


async def measure(
    executor: Executor, settings: EngineSettings, token_budget: int, points: Sequence[Point], prompts: Sequence[int],
    rounds: int, heard: Heard = lambda what, share: None,
) -> tuple[tuple[Reached, ...], Mapping[int, float]]:  # fmt: skip
    """Decode steps at the points that fit, and seconds of prefill steps by tokens. Every round visits every point, in
    another order each time. Raises TooLarge if nothing fits."""
    capacity = executor.capacity
    kept = fitting([*((rows, 0) for rows in sorted({rows for rows, _ in points})), *points], capacity)
    if not any(context for _, context in kept):
        raise TooLarge(f"{capacity.blocks} blocks of {capacity.block_tokens} tokens are too few; give more --kv-memory")
    room = min(capacity.blocks * capacity.block_tokens, capacity.max_context_tokens - 1)
    between = await _between(executor, settings, token_budget, sorted({rows for rows, _ in kept}), heard)
    bench = Bench(executor, lengths(kept))
    prefills = {tokens: await _prefill(bench, tokens, rounds) for tokens in sorted(set(prompts)) if tokens <= room}
    await bench.fill(heard)
    took = await _visits(bench, kept, rounds, heard)
    await bench.forget()
    reached = [_reached(point, took[point], took[point[0], 0], between[point[0]]) for point in kept if point[1]]
    return tuple(reached), prefills


async def _prefill(bench: Bench, tokens: int, rounds: int) -> float:
    """The median, after one to warm up."""
    await bench.prefill(tokens)
    return median([await bench.prefill(tokens) for _ in range(rounds)])


async def _visits(
    bench: Bench, points: Sequence[Point], rounds: int, heard: Heard
) -> Mapping[Point, Mapping[str, float]]:
    """The median seconds of the kinds of steps at every point."""
    order, found = Random(0), {point: defaultdict[str, list[float]](list) for point in points}
    for turn in range(rounds):
        for at, point in enumerate(order.sample(points, len(points))):
            heard("measure steps", (turn * len(points) + at) / (rounds * len(points)))
            for kind, seconds in (await bench.visit(*point)).items():
                found[point][kind] += seconds
    heard("measure steps", 1.0)
    return {point: {kind: median(seconds) for kind, seconds in kinds.items()} for point, kinds in found.items()}


async def _between(
    executor: Executor, settings: EngineSettings, token_budget: int, rows: Sequence[int], heard: Heard
) -> Mapping[int, float]:
    """Seconds from the end of a step to the next plan, with so many requests that decode."""
    settings = replace(settings, max_running=max(settings.max_running, *rows))
    async with probing(executor, settings, token_budget) as prober:
        for at, decoders in enumerate(rows):
            heard("measure what comes between steps", at / len(rows))
            await prober.session(Session((0,) * decoders), decoders)
        heard("measure what comes between steps", 1.0)
        steps = prober.watch.steps
    return {one: median(step.host_s for step in steps if step.batch.decodes == one) for one in rows}


def _reached(point: Point, here: Mapping[str, float], bare: Mapping[str, float], between_s: float) -> Reached:
    """What is left when other steps are taken away."""
    preparing = max(0.0, here["split"] - here["bare"])
    parts = {
        LAYERS: bare["bare"] - preparing,
        ATTENTION: here["bare"] - bare["bare"],
        HEAD: here["whole"] - here["bare"],
        PREPARING: preparing,
        BETWEEN: between_s,
    }
    return Reached(*point, {name: max(0.0, seconds) for name, seconds in parts.items()})
