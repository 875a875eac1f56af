"""Performs step plans: plan -> rows of tokens -> layers -> sampler -> result.

Owns what it must remember of each request between steps: its tokens, its block table, its sampling
state, and the states of tokens that are on their way through the layers. Decides nothing. Steps run one after the other
on one thread of their own, so the event loop stays free; those of several lanes side by side, see `lanes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise, repeat
from typing import TYPE_CHECKING

import numpy as np

from headrace.core.clock import perf
from headrace.core.ports import Capacity
from headrace.core.shape import ModelShape
from headrace.core.step import Admitted, Sampled, StepPlan, StepResult, Work
from headrace.core.types import InvalidRequest, Request, RequestId, Sampling, TokenLogprob, Tokens
from headrace.device.control import Bits, Controls, SequenceController
from headrace.device.forward import Forward, Rows, States
from headrace.device.hosttier import Tier
from headrace.device.sampler import Row, joined

if TYPE_CHECKING:
    from headrace.device.reference.lanes import Workers

_LOGIT_ROWS = 64  # rows of logits computed at once for prompt log-probabilities and drafts: bounds their memory


@dataclass(slots=True)
class _Sequence:
    """What the executor remembers of one request."""

    ids: list[int]  # all known tokens
    prompt_tokens: int
    row: Row
    blocks: list[int]
    control: SequenceController | None = None
    states: States | None = None  # [tokens, hidden] of work that went through some layers and not through the last
    table: np.ndarray = field(init=False)  # `blocks` as int64, rebuilt when they change

    def __post_init__(self) -> None:
        self.extend(())

    def extend(self, new: Iterable[int]) -> None:
        self.blocks.extend(new)
        self.table = np.array(self.blocks, dtype=np.int64)

    def replace(self, pairs: Iterable[tuple[int, int]]) -> None:
        for index, block in pairs:
            self.blocks[index] = block
        self.extend(())

    def drew(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.ids.append(token)
            self.row.drew(token)
        if self.control is not None:
            self.control.drew(tokens)

    def cut(self, blocks: int) -> None:
        """Those after the first so many held nothing but drafts."""
        if len(self.blocks) > blocks:
            del self.blocks[blocks:]
            self.extend(())


class ModelExecutor:
    """An `Executor` for one model on one device, whatever computes its layers."""

    def __init__(
        self,
        forward: Forward,
        capacity: Capacity,
        thread: ThreadPoolExecutor | None = None,
        host: Tier | None = None,
        shared: bool = False,
    ) -> None:
        """`controls` may be set before the first plan; without them, no request may have a grammar or think.

        Steps run on `thread`, which has one worker and should be the one that loaded the model, for torch keeps a team
        of compute threads per calling thread, and two teams on the same cores slow each other's barriers by half.
        A `shared` thread takes the steps of several models in turn, and stays when this one is closed."""
        self.controls: Controls | None = None
        self._forward = forward
        self._capacity = capacity
        self._sequences: dict[RequestId, _Sequence] = {}
        self._thread = thread or one_thread()
        self._shared = shared
        self._host = host
        self._workers: Workers | None = None  # once a plan has several lanes
        self._computing: dict[int, frozenset[RequestId]] = {}  # by lane

    @property
    def shape(self) -> ModelShape:
        return self._forward.shape

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return self._forward.row_sizes

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def thread(self) -> ThreadPoolExecutor:
        """Where steps run; other tensor work of the process belongs there too, between the steps."""
        return self._thread

    async def run(self, plan: StepPlan) -> StepResult:
        if len(plan.lanes) > 1:
            return await self._run_beside(plan)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.step, plan)

    async def _run_beside(self, plan: StepPlan) -> StepResult:
        """`run` where other lanes have steps under way. What a plan admits and releases counts in the order of the
        calls, so that is done here; what it computes belongs to its lane alone."""
        if self._workers is None:
            from headrace.device.reference.lanes import Workers

            self._workers = Workers()
        works = plan.work
        try:
            self._update(plan, works)
            self._computing[plan.lane] = frozenset(work.request_id for work in works)
            thread = self._workers.of(plan.lane, plan.lanes)
            return await asyncio.get_running_loop().run_in_executor(thread, self._perform, plan, works)
        except BaseException:
            self._computing.pop(plan.lane, None)
            beside = frozenset[RequestId]().union(*self._computing.values())
            for request_id in self._sequences.keys() - beside:
                del self._sequences[request_id]
            raise
        finally:
            self._computing.pop(plan.lane, None)

    def interrupt(self) -> None:
        """Its plans stand for one step each."""

    async def close(self) -> None:
        if self._shared:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._sequences.clear)
        else:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if self.controls is not None:
            self.controls.close()
        if self._workers is not None:
            self._workers.close()

    def step(self, plan: StepPlan) -> StepResult:
        """Perform one plan, blocking. On any error every request is forgotten, as the port says."""
        try:
            works = plan.work
            self._update(plan, works)
            with self._copying(plan):
                return self._perform(plan, works)
        except BaseException:
            self._sequences.clear()
            raise

    def _perform(self, plan: StepPlan, works: Sequence[Work]) -> StepResult:
        if not works:
            return StepResult(plan.step, {})
        masks = self._begin_masks(works)
        computed, hidden = self._compute(works)
        allowed = masks.result() if masks else {}
        sampled = self._sample(computed, hidden, allowed)
        failed = self._failed(allowed)
        return StepResult(plan.step, sampled, self._prompt_logprobs(computed, hidden), failed=failed)

    def measure(self, tokens: Sequence[int]) -> list[tuple[int, float]]:
        """(tokens, seconds) of steps that prefill so many tokens, the better of two, after one to warm up. Uses blocks
        from 0 up, so only before the first plan."""
        room = min(self._capacity.blocks * self._capacity.block_tokens, self._capacity.max_context_tokens) - 1
        counts = sorted({min(count, room) for count in tokens})
        self._measure_one(counts[0])
        return [(count, min(self._measure_one(count), self._measure_one(count))) for count in counts]

    def _measure_one(self, count: int) -> float:
        request = Request("measure", (Tokens((0,) * count),), 0.0, 1, Sampling(temperature=0))
        blocks = tuple(range(-(-count // self._capacity.block_tokens)))
        plan = StepPlan(0, (Work("measure", 0, count, True),), (Admitted(request, (), blocks, 0),))
        begin = perf()
        self.step(plan)
        seconds = perf() - begin
        self.step(StepPlan(0, (), released=("measure",)))
        return seconds

    @contextmanager
    def _copying(self, plan: StepPlan) -> Iterator[None]:
        """The plan's copies go on beside what happens inside."""
        if plan.copies:
            if self._host is None:
                raise RuntimeError("the plan copies to a tier that this executor does not have")
            self._host.begin(plan)
        yield
        if plan.copies and self._host is not None:
            self._host.end()

    def _update(self, plan: StepPlan, works: Sequence[Work]) -> None:
        """Forget, remember, and grow block tables."""
        for request_id in plan.released:
            self._sequences.pop(request_id, None)
        for admitted in plan.admitted:
            self._sequences[admitted.request.id] = self._remember(admitted)
        for work in works:
            sequence = self._sequences[work.request_id]
            if work.replaced_blocks:
                sequence.replace(work.replaced_blocks)
            if work.new_blocks:
                sequence.extend(work.new_blocks)

    def _compute(self, works: Sequence[Work]) -> tuple[Sequence[Work], States]:
        """Send all works through their layers. Returns those that the last layer computed, and what came out of it:
        [rows, hidden], rows in the order of these works, then padding.

            layers  0       8      16      24
            a, b    .-------+-------+-------.     the works that cross a stretch of layers go through it side by side
            p               '-------'             from the states after layer 8, kept by the last step
        """
        layers = self.shape.layers
        edges = sorted({0, layers, *(edge for work in works for edge in work.layers or ())})
        states: dict[RequestId, States] = {}
        side_by_side = list[Work]()
        hidden: States = ()
        for first, last in pairwise(edges):
            side_by_side = [work for work in works if work.layers is None or work.layers[0] <= first < work.layers[1]]
            if side_by_side:
                hidden = self._through(side_by_side, first, last, states)
                if last < layers:
                    states |= _by_request(side_by_side, hidden)
        for work in works:
            kept = work.layers is not None and work.layers[1] < layers
            self._sequences[work.request_id].states = self._forward.joined([states[work.request_id]]) if kept else None
        return side_by_side, hidden

    def _through(self, works: Sequence[Work], first: int, last: int, states: Mapping[RequestId, States]) -> States:
        """Layers first, ..., last - 1 of some works: [rows, hidden], rows in their order, then padding. `states` holds
        what those of them have come to that were in earlier layers in this step."""
        spans, ids, row = [], list[int](), 0
        for work in works:
            sequence = self._sequences[work.request_id]
            spans.append(Rows(row, work.start, work.tokens, sequence.table))
            row += work.tokens
            if not first:
                ids += sequence.ids[work.start : work.start + work.tokens - len(work.drafts)]
                ids += work.drafts
        x = self._resume(works, states) if first else None
        return self._forward.layers(spans, first, last, ids, x)

    def _resume(self, works: Sequence[Work], states: Mapping[RequestId, States]) -> States:
        """Where they were: after earlier layers of this step, or of the step before."""
        found = [states.get(work.request_id, self._sequences[work.request_id].states) for work in works]
        parts = [part for part in found if part is not None]
        if [len(part) for part in parts] != [work.tokens for work in works]:
            raise RuntimeError("the plan goes on in the middle of the layers with tokens that did not come there")
        return self._forward.joined(parts)

    def _begin_masks(self, works: Sequence[Work]) -> Future[dict[RequestId, list[Bits | None]]] | None:
        """Which tokens may be drawn by those who draw and may not draw everything, computed beside what follows."""
        wanted = {}
        for work in works:
            control = self._sequences[work.request_id].control
            if work.sample and control is not None:
                wanted[work.request_id] = (control, work.drafts)
        return self.controls.begin(wanted) if wanted and self.controls else None

    def _failed(self, asked: Iterable[RequestId]) -> dict[RequestId, str]:
        """Who of them cannot go on, and why."""
        controls = {request_id: self._sequences[request_id].control for request_id in asked}
        return {name: control.failure for name, control in controls.items() if control and control.failure}

    def _remember(self, admitted: Admitted) -> _Sequence:
        request = admitted.request
        prompt = request.prompt_ids()
        if prompt is None:
            raise InvalidRequest("a real model needs the prompt's tokens, not only their number", "prompt")
        if self.controls is None and (request.grammar or request.thinking):
            raise InvalidRequest("this executor holds no answers to a grammar or to a budget")
        control = self.controls.of(request, admitted.output_ids) if self.controls else None
        row = Row.of(request.sampling, prompt, admitted.output_ids)
        return _Sequence([*prompt, *admitted.output_ids], len(prompt), row, list(admitted.blocks), control)

    def _sample(
        self, works: Sequence[Work], hidden: States, allowed: Mapping[RequestId, list[Bits | None]]
    ) -> dict[RequestId, Sampled]:
        """Draw a token for every work that asks, from the logits of its last known row, and one after each draft. What
        is drawn after a draft counts if that draft itself was drawn: the tokens are those of one step after another.
        """
        wanted, rows, end = list[int](), list[Row](), 0
        for work in works:
            end += work.tokens
            if work.sample:
                wanted += range(end - len(work.drafts) - 1, end)
                own = self._sequences[work.request_id].row.with_drafts(work.drafts)
                for row, bits in zip(own, allowed.get(work.request_id) or repeat(None), strict=False):
                    row.allowed = bits
                rows += own
        drawing = [work for work in works if work.sample]
        at_once = max(len(drawing), _LOGIT_ROWS)  # no more logits in memory than without drafts
        drawn = chain.from_iterable(
            self._drawn(hidden, wanted[at : at + at_once], rows[at : at + at_once])
            for at in range(0, len(wanted), at_once)
        )
        return {work.request_id: self._accept(work, drawn) for work in drawing}

    def _drawn(self, hidden: States, wanted: Sequence[int], rows: Sequence[Row]) -> list[Sampled]:
        return self._forward.sample(hidden, np.array(wanted), rows)

    def _accept(self, work: Work, drawn: Iterator[Sampled]) -> Sampled:
        """Keep what was drawn up to the first token that is not the next draft."""
        sequence, own = self._sequences[work.request_id], list(islice(drawn, len(work.drafts) + 1))
        sampled = joined(own, work.drafts)
        sequence.drew(sampled.token_ids)
        if work.drafts:
            sequence.cut(-(-(len(sequence.ids) - 1) // self._capacity.block_tokens))
        return sampled

    def _prompt_logprobs(self, works: Sequence[Work], hidden: States) -> dict[RequestId, tuple[TokenLogprob, ...]]:
        """For requests that ask: what the model thought of each next prompt token, from this step's rows."""
        found: dict[RequestId, tuple[TokenLogprob, ...]] = {}
        first = 0
        for work in works:
            sequence = self._sequences[work.request_id]
            count = sequence.row.sampling.prompt_logprobs
            judged = min(work.start + work.tokens, sequence.prompt_tokens - 1) - work.start
            if count is not None and judged > 0:
                nexts = sequence.ids[work.start + 1 : work.start + 1 + judged]
                found[work.request_id] = tuple(self._judge(hidden, np.arange(first, first + judged), nexts, count))
            first += work.tokens
        return found

    def _judge(self, hidden: States, rows: np.ndarray, nexts: Sequence[int], count: int) -> Iterable[TokenLogprob]:
        for begin in range(0, len(rows), _LOGIT_ROWS):
            some = slice(begin, begin + _LOGIT_ROWS)
            yield from self._forward.judged(hidden, rows[some], nexts[some], count)


def _by_request(works: Sequence[Work], x: States) -> dict[RequestId, States]:
    """The rows of each work, without the padding."""
    parts, first = dict[RequestId, States](), 0
    for work in works:
        parts[work.request_id] = x[first : first + work.tokens]
        first += work.tokens
    return parts


def one_thread() -> ThreadPoolExecutor:
    """The thread that all of one model's tensor work belongs to."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="headrace-step")
