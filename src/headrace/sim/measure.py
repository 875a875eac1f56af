"""Measures what steps of a live engine cost: crafted requests make the scheduler plan the steps that a design asks for,
and the time from one plan to the next is what they cost, the host's work included.

Prompts begin with documents whose KV is in the prefix cache, so a step at any context is one request away. A session
decodes side by side while probes come, one set of prompts after the other:

    decoders   o o o o o o o o o o o        steps of k rows, and mixed ones of k rows and what a probe computes
    probes           [p]   [q r]

Owns the engine's requests while it measures. Knows time by the events' clock only, so it runs in virtual time too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from statistics import median
from typing import NamedTuple

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Event, Planned, StepDone
from headrace.core.keys import block_keys
from headrace.core.ports import Capacity, Executor
from headrace.core.step import Run, StepPlan, StepResult
from headrace.core.types import HeadraceError, Request, RequestId, Tokens
from headrace.engine.loop import Engine
from headrace.engine.scheduler import Scheduler
from headrace.sim.cost.batch import Batch, Spans, batch_of_plan
from headrace.sim.cost.fit import Sample

DECODE_STEPS = 4  # of a session before its first probe
FULL_ROWS = 8  # that decode at the longest context; more decode at a half of it and less, which takes less preparing
MOST_TOGETHER = 8  # prompts of a probe
LONGEST = 3  # times the median: what a repeat counts as at most
_MOST_NEW = 1 << 12  # a decoder is aborted long before
_SALT = b"headrace calibrate"

Probe = tuple[tuple[int, int], ...]  # prompts sent together: (tokens in the cache, tokens to compute)


class MeasuringFailed(HeadraceError):
    """The engine could not do what it was measured with."""


class Session(NamedTuple):
    """What is measured together: requests that decode at these contexts, and what comes meanwhile."""

    contexts: tuple[int, ...]
    probes: tuple[Probe, ...] = ()


class Step(NamedTuple):
    """One measured step."""

    label: int | None  # of the session; None: outside of any
    batch: Batch
    seconds: float  # until the next plan
    host_s: float  # of these, after the executor was through
    at_s: float  # when it was planned


class Watch:
    """Stands between an engine and its executor, and listens to its scheduler: an `Executor` and an `Observer`."""

    def __init__(self, executor: Executor) -> None:
        self.steps: list[Step] = []
        self.label: int | None = None  # of the steps from now on
        self._executor = executor
        self._batch: Batch | None = None  # of the step under way
        self._label: int | None = None
        self._planned_s = self._done_s = 0.0
        self._busy = False  # the executor is
        self._more = asyncio.Event()

    @property
    def capacity(self) -> Capacity:
        """Whatever the batch policy, steps that are measured compute the same rows in all layers."""
        return replace(self._executor.capacity, layers=1)

    async def run(self, plan: StepPlan) -> StepResult:
        self._batch, self._label = batch_of_plan(plan), self.label
        self._busy = True
        try:
            return await self._executor.run(plan)
        finally:
            self._busy = False

    def interrupt(self) -> Run | None:
        return self._executor.interrupt()

    async def close(self) -> None:
        await self._executor.close()

    def observe(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._done_s = event.at_s
        elif isinstance(event, Planned):
            if self._batch is not None and self._batch.rows:  # no plan is idle but one without rows
                seconds, host_s = event.at_s - self._planned_s, event.at_s - self._done_s
                self.steps.append(Step(self._label, self._batch, seconds, host_s, self._planned_s))
                self._more.set()
            self._batch, self._planned_s = None, event.at_s

    async def reached(self, steps: int) -> None:
        """Wait until so many steps have been measured."""
        while len(self.steps) < steps:
            self._more.clear()
            await self._more.wait()

    async def settled(self) -> None:
        """Wait until the step under way is over, and the one after it, in which the executor hears whom to forget."""
        for _ in range(2):
            await clock.sleep(0.01)
            while self._busy:
                await clock.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step costs, from several of the same."""

    sample: Sample  # the mean of the repeats, stalls and all, for a queue feels them; none counts as more than LONGEST
    repeats: int
    spread: float  # half of what the middle half of the repeats covers, relative to the mean


class Prober:
    """Drives one engine through sessions. Made by `probing`."""

    def __init__(self, engine: Engine, watch: Watch, vocab: int, seed: int = 0) -> None:
        self.watch = watch
        self._engine = engine
        self._capacity = watch.capacity
        self._random = Random(seed)
        self._vocab = vocab
        self._documents: list[tuple[int, ...]] = []
        self._numbers = count()

    async def prepare(self, lengths: Sequence[int], progress: Callable[[int], None] = lambda _: None) -> None:
        """Put the KV of documents of these lengths into the prefix cache."""
        for number, tokens in enumerate(lengths):
            self._documents.append(self._draw(tokens))
            await self._read(self._request(number, tokens, 1, 1))
            progress(number + 1)

    async def session(self, session: Session, label: int) -> None:
        """Raises MeasuringFailed if a step did. Documents are dealt to the requests in order, from the start again."""
        self.watch.label = label
        requests = [self._request(at, context, 1, _MOST_NEW) for at, context in enumerate(session.contexts)]
        decoding = [asyncio.create_task(self._read(request)) for request in requests]
        try:
            if requests:
                enough = asyncio.create_task(self.watch.reached(len(self.watch.steps) + DECODE_STEPS))
                await asyncio.wait({enough, *decoding}, return_when=asyncio.FIRST_COMPLETED)  # who ends now has failed
                enough.cancel()
            for probe in session.probes:
                sent = [self._request(len(requests) + at, *prompt, 1) for at, prompt in enumerate(probe)]
                await asyncio.gather(*(self._read(request) for request in sent))
        finally:
            for request in requests:
                self._engine.abort(request.id)
            await asyncio.gather(*decoding)
            self.watch.label = None

    def _request(self, number: int, context: int, tokens: int, most_new: int) -> Request:
        """`context` tokens of a document in the cache, rounded to whole blocks, and `tokens` that nobody knows."""
        size = self._capacity.block_tokens
        document = self._documents[number % len(self._documents)][: context // size * size] if self._documents else ()
        ids = document + self._draw(tokens)
        most_new = min(most_new, self._capacity.max_context_tokens - len(ids))
        keys = block_keys(document, size, _SALT)
        name: RequestId = f"calibrate {next(self._numbers)}"
        return Request(name, (Tokens(ids),), clock.now(), most_new, block_keys=keys, salt=_SALT)

    def _draw(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self._vocab), k=tokens))

    async def _read(self, request: Request) -> None:
        error = None
        async for output in self._engine.generate(request):
            error = output.error or error
        if error:
            raise MeasuringFailed(f"what was measured failed: {error}")


@asynccontextmanager
async def probing(executor: Executor, settings: EngineSettings, token_budget: int) -> AsyncIterator[Prober]:
    """A fresh engine in front of this executor, for as long as it is measured. It runs a few more requests than the
    settings say, for the probes of a session that has as many decoders."""
    watch = Watch(executor)
    settings = replace(settings, max_running=settings.max_running + MOST_TOGETHER, prefix_cache=True)
    scheduler = Scheduler(settings, executor.capacity, token_budget=token_budget, observer=watch)
    engine = Engine("calibrate", scheduler, watch)
    serving = asyncio.create_task(engine.run())
    try:
        yield Prober(engine, watch, executor.capacity.vocab)
        await engine.drain(10.0)
        await watch.settled()
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


def design(rows: int, context: int, token_budget: int) -> list[Session]:
    """Sessions of 1 to `rows` decoders at contexts up to `context`, alike and apart, each with prompts of lengths up
    to the budget that come alone and together, fresh and after a prefix."""
    lengths = _ladder(token_budget)
    after = [((start, tokens),) for start in (context // 2, context) for tokens in lengths[1::2]]
    sessions = [Session((), tuple(((0, tokens),) for tokens in lengths)), Session((), tuple(after))]
    ladder = sorted({*(n for n in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192) if n < rows), rows})
    for at, decoders in enumerate(ladder):
        alike = context if decoders <= FULL_ROWS and at % 2 else max(1, context // 8)
        for turn, contexts in enumerate((_apart(decoders, context), (alike,) * decoders)):
            start, length = (0, context // 4, context // 2)[at % 3], lengths[(2 * at + 3 * turn) % len(lengths)]
            alone = ((start, max(2, length - decoders)),)
            together = ((0, lengths[at % 3]),) * (2 + at % 3)
            sessions.append(Session(contexts, (alone,) if turn else (alone, together)))
    return sessions


def _ladder(most: int) -> list[int]:
    """Lengths from 2 to `most`, each about half as long again as the one before, and not only the powers of 2."""
    lengths = [n for n in (2, 12, 24, 40, 64, 90, 128, 180, 256, 380, 512, 760, 1024, 1500) if n < most]
    return [*lengths, max(2, most)]


def _apart(decoders: int, context: int) -> tuple[int, ...]:
    """Contexts from the longest down to an eighth of it: more short ones than long ones."""
    low = max(1, context // 8)
    longest = [low + round((context - low) * (1 - at / max(1, decoders - 1)) ** 2) for at in range(decoders)]
    return (*longest[:FULL_ROWS], *(min(one, context // 2) for one in longest[FULL_ROWS:]))


def documents(sessions: Sequence[Session]) -> list[int]:
    """Tokens of the documents that the sessions read: as many as there are requests at once."""
    lengths: dict[int, int] = defaultdict(int)
    for session in sessions:
        for at, context in enumerate(session.contexts):
            lengths[at] = max(lengths[at], context)
        for probe in session.probes:
            for at, (context, _) in enumerate(probe, len(session.contexts)):
                lengths[at] = max(lengths[at], context)
    return [lengths[at] for at in range(len(lengths))]


def grouped(steps: Sequence[Step]) -> list[Measured]:
    """Steps of the same session and shape become one: what they computed and took on average."""
    groups: dict[tuple[object, ...], list[Step]] = defaultdict(list)
    for step in steps:
        batch = step.batch
        groups[step.label, batch.rows, batch.tokens, batch.sampled, batch.full.pairs].append(step)
    return [_measured(group) for group in groups.values()]


def _measured(group: Sequence[Step]) -> Measured:
    seconds = sorted(step.seconds for step in group)
    most, quarter = LONGEST * median(seconds), len(seconds) // 4
    mean = sum(min(one, most) for one in seconds) / len(seconds)
    covered = seconds[len(seconds) - quarter - 1] - seconds[quarter]
    return Measured(Sample(_mean([step.batch for step in group]), mean), len(group), covered / 2 / mean)


def _mean(batches: Sequence[Batch]) -> Batch:
    """Steps of one shape differ in the contexts they read."""
    first, share = batches[0], 1 / len(batches)
    full = Spans(
        first.full.pairs,
        sum(batch.full.prefill_context for batch in batches) * share,
        sum(batch.full.decode_context for batch in batches) * share,
        first.full.growing,
    )
    reach = sum(batch.prefill_reach for batch in batches) * share
    return first._replace(prefill_reach=reach, full=full, longest=sum(batch.longest for batch in batches) * share)


def host_seconds(steps: Sequence[Step]) -> float:
    """What the host takes between the end of a step and the next plan."""
    return median(step.host_s for step in steps)
