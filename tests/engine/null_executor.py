"""An executor that computes nothing and believes nothing: it keeps, for every slot of every block in every layer, the
exact tokens that a real one would have made KV from, and verifies each plan against them. Its tokens depend on the
request's own prefix only, so whatever the scheduler does, a request must get the tokens it would get alone. So do the
guesses of `seer`, a drafter that is right two times in three."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from headrace.core import clock
from headrace.core.ports import Capacity
from headrace.core.step import DEVICE, HOST, Admitted, Block, Sampled, StepPlan, StepResult, Work
from headrace.core.types import Request, RequestId, TokenLogprob
from headrace.engine.policy import Draft, RequestView

VOCAB = 50
Prefix = int  # a hash of all tokens up to and with this one: equal prefixes, equal KV


def draw(prefix: Prefix, vocab: int) -> int:
    """The made-up token after a prefix."""
    return zlib.crc32(prefix.to_bytes(8, "little", signed=True)) % vocab


def prefixes(token_ids: list[int]) -> list[Prefix]:
    """One per position."""
    out, prefix = [], 0
    for token in token_ids:
        prefix = zlib.crc32(token.to_bytes(8, "little"), prefix)
        out.append(prefix)
    return out


def reference(request: Request, capacity: Capacity) -> list[int]:
    """The output of a request that runs alone."""
    ids = list(request.prompt_ids() or ())
    prompt = len(ids)
    while len(ids) < min(prompt + request.max_new_tokens, capacity.max_context_tokens):
        ids.append(draw(prefixes(ids)[-1], capacity.vocab))
        if ids[-1] in request.stop_token_ids:
            break
    return ids[prompt:]


def seer(request: RequestView, most: int) -> Draft | None:
    """Of a third party: what will be drawn, but for a wrong token now and then, and for nothing at all sometimes."""
    ids = list(request.token_ids(0, request.known_tokens) or ())
    luck, drafts = zlib.crc32(repr((request.request.id, len(ids))).encode()), list[int]()
    for at in range(most if luck % 4 else 0):
        right = draw(prefixes([*ids, *drafts])[-1], VOCAB)
        drafts.append(right if (luck >> at) % 3 else (right + 1) % VOCAB)
    return Draft(tuple(drafts), 3) if drafts else None


@dataclass
class Known:
    """What the executor remembers of one request."""

    request: Request
    token_ids: list[int]
    blocks: list[Block]
    computed: int
    pending: tuple[int, int, int] | None = None  # (start, tokens, layers passed) of what is on its way
    drafts: tuple[int, ...] = ()  # in this step, after the computed ones
    computed_once: list[int] = field(default_factory=list)  # positions, since this admission


class NullExecutor:
    """`step_s` seconds of virtual time per step; `failing` step numbers raise instead."""

    def __init__(self, capacity: Capacity, step_s: float = 0.01, failing: frozenset[int] = frozenset()) -> None:
        self._capacity = capacity
        self.step_s = step_s
        self.failing = failing
        self.known: dict[RequestId, Known] = {}
        self.slots: dict[tuple[Block, int, int], Prefix] = {}  # (block, offset, layer)
        self.host: dict[Block, dict[tuple[int, int], Prefix]] = {}  # what was copied out: block -> (offset, layer)
        self.copied_out = self.copied_in = 0  # blocks
        self.plans: list[StepPlan] = []
        self.computing: dict[int, list[RequestId]] = {}  # by lane, in steps that have begun
        self.fetched: dict[int, set[Block]] = {}  # by lane, blocks of the device that are copied in
        self.computed_tokens = 0
        self.drafted = self.accepted = 0
        self.forgotten: set[RequestId] = set()  # in failed steps: the scheduler may still ask to forget them

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    async def run(self, plan: StepPlan) -> StepResult:
        self.begin(plan)
        await clock.sleep(self.step_s)
        if plan.step in self.failing:
            self.end(plan)
            self.spoil(plan)
            raise RuntimeError("the device fell over")
        return self.end(plan)

    async def close(self) -> None:
        self.known.clear()

    def spoil(self, plan: StepPlan) -> None:
        """What a failed step leaves: no requests, and garbage wherever it may have written."""
        size = self._capacity.block_tokens
        for work in plan.work:
            blocks = self.known[work.request_id].blocks
            for position in range(work.start, min(work.start + work.tokens, len(blocks) * size)):
                for layer in range(self._capacity.layers):
                    slot = (blocks[position // size], position % size, layer)
                    self.slots.pop(slot, None)
        beside = {name for names in self.computing.values() for name in names}
        for copy in plan.copies:
            for _, target in copy.pairs:
                if copy.target_tier == HOST:
                    self.host.pop(target, None)
                else:
                    self._fill(target, {})
        self.forgotten |= self.known.keys() - beside
        self.known = {name: known for name, known in self.known.items() if name in beside}

    def perform(self, plan: StepPlan) -> StepResult:
        self.begin(plan)
        return self.end(plan)

    def begin(self, plan: StepPlan) -> None:
        """It may write any of its slots from here to its end."""
        assert plan.lane not in self.computing, "a lane has two steps"
        assert 0 <= plan.lane < len(plan.lanes)
        assert not self.plans or plan.step > self.plans[-1].step, "step numbers must grow"
        self.plans.append(plan)
        for request_id in plan.released:
            assert request_id in self.known or request_id in self.forgotten, "released a request nobody knows"
            self.known.pop(request_id, None)
            self.forgotten.discard(request_id)
            assert all(request_id not in names for names in self.computing.values()), "released amid its step"
        if len(plan.lanes) == 1:
            self.forgotten.clear()
        for admitted in plan.admitted:
            self._admit(admitted)
        served = [work.request_id for work in plan.work]
        assert len(set(served)) == len(served), "a request has two works in one step"
        fetched = self._check_copies(plan)
        for admitted in plan.admitted:
            assert admitted.request.id in served or fetched & {*admitted.blocks}, "admitted without work"
        for work in plan.work:
            self._extend_table(work)
        self._check_writers(plan)
        self._copy_out(plan)
        assert not any(set(served) & set(names) for names in self.computing.values()), "computed in two lanes"
        self.computing[plan.lane], self.fetched[plan.lane] = served, fetched
        for work in plan.work:
            self._write(work)

    def end(self, plan: StepPlan) -> StepResult:
        served, fetched = self.computing.pop(plan.lane), self.fetched.pop(plan.lane)
        for work in plan.work:  # all writes before all reads, as within a layer
            self._write(work)
            self._go_on(work)
        for known in map(self.known.__getitem__, served):
            assert not fetched & {*known.blocks}, "a step reads what is copied in beside it"
            self._read(known)
        self._copy_in(plan)
        for known in self.known.values():
            self._read(known)
        return StepResult(
            plan.step,
            {work.request_id: self._sample(work) for work in plan.work if work.sample},
            {work.request_id: logprobs for work in plan.work if (logprobs := self._prompt_logprobs(work))},
        )

    def _admit(self, admitted: Admitted) -> None:
        request = admitted.request
        assert request.id not in self.known, "admitted twice"
        assert admitted.start % self._capacity.block_tokens == 0
        assert len(admitted.blocks) * self._capacity.block_tokens == admitted.start
        token_ids = [*(request.prompt_ids() or ()), *admitted.output_ids]
        assert admitted.start < len(token_ids), "the last token must be computed"
        if request.sampling.prompt_logprobs is not None:
            assert admitted.start == 0, "a request that wants prompt logprobs read the cache"
        self.known[request.id] = Known(request, token_ids, list(admitted.blocks), admitted.start)

    def _extend_table(self, work: Work) -> None:
        known = self.known[work.request_id]
        size = self._capacity.block_tokens
        first, last = work.layers or (0, self._capacity.layers)
        assert 0 <= first < last <= self._capacity.layers
        if known.pending or first:
            assert known.pending == (work.start, work.tokens, first), "other tokens than those that came to this layer"
            assert not work.new_blocks and not work.replaced_blocks
        for at, block in work.replaced_blocks:
            assert known.blocks[at] != block
            known.blocks[at] = block
        known.blocks.extend(work.new_blocks)
        assert work.start >= known.computed, "computed twice"
        if work.start > known.computed:
            assert work.start % size == 0, "skipped tokens that no block can hold"
        known.computed = work.start
        end = work.start + work.tokens
        known_end = end - len(work.drafts)
        assert known_end > work.start
        assert known_end <= len(known.token_ids), "computed a token nobody knows"
        assert work.sample == (known_end == len(known.token_ids) and last == self._capacity.layers)
        assert not work.drafts or (work.sample and work.layers is None)
        limit = min(known.request.prompt_tokens + known.request.max_new_tokens, self._capacity.max_context_tokens)
        assert end < limit, "drafts beyond the end"
        assert len(known.blocks) == -(-end // size), "the table is too short or too long"
        assert len(set(known.blocks)) == len(known.blocks), "a table names a block twice"
        assert all(0 <= block < self._capacity.blocks for block in known.blocks)

    def _check_writers(self, plan: StepPlan) -> None:
        """Nobody writes a block that somebody else has in the table, unless that one expects the same content."""
        size = self._capacity.block_tokens
        holders: dict[Block, list[tuple[RequestId, int]]] = {}
        for request_id, known in self.known.items():
            for at, block in enumerate(known.blocks):
                holders.setdefault(block, []).append((request_id, at))
        for work in plan.work:
            known = self.known[work.request_id]
            for at in range(work.start // size, -(-(work.start + work.tokens) // size)):
                for other_id, other_at in holders[known.blocks[at]]:
                    other, end = self.known[other_id], (at + 1) * size
                    assert other_at == at
                    assert other is known or other.token_ids[:end] == known.token_ids[:end], "wrote into a shared block"

    def _write(self, work: Work) -> None:
        known, size = self.known[work.request_id], self._capacity.block_tokens
        made = prefixes([*known.token_ids[: work.start + work.tokens - len(work.drafts)], *work.drafts])
        for position in range(work.start, work.start + work.tokens):
            for layer in range(*(work.layers or (0, self._capacity.layers))):
                self.slots[known.blocks[position // size], position % size, layer] = made[position]

    def _check_copies(self, plan: StepPlan) -> set[Block]:
        """Each copy is sorted by the host's blocks, nothing is overwritten twice. Returns the blocks copied in."""
        fetched: set[Block] = set()
        for copy in plan.copies:
            out = (copy.source_tier, copy.target_tier) == (DEVICE, HOST)
            assert out or (copy.source_tier, copy.target_tier) == (HOST, DEVICE)
            sides = list(zip(*copy.pairs, strict=True))
            on_host, targets = sides[1] if out else sides[0], sides[1]
            assert list(on_host) == sorted(on_host)
            assert len(set(targets)) == len(targets), "two copies go to one block"
            assert all(0 <= block < self._capacity.host_blocks for block in on_host)
            fetched |= set() if out else set(targets)
        assert [copy.target_tier for copy in plan.copies] in ([], [HOST], [DEVICE], [HOST, DEVICE])
        return fetched

    def _copy_out(self, plan: StepPlan) -> None:
        """As early as may be: whatever this step computes is not in it."""
        size, layers = self._capacity.block_tokens, self._capacity.layers
        for copy in plan.copies:
            for source, target in copy.pairs if copy.target_tier == HOST else ():
                slots = {
                    (at, layer): self.slots.get((source, at, layer)) for at in range(size) for layer in range(layers)
                }
                assert None not in slots.values(), "copied out what nobody computed"
                self.host[target] = {slot: prefix for slot, prefix in slots.items() if prefix is not None}
                self.copied_out += 1

    def _copy_in(self, plan: StepPlan) -> None:
        """As late as may be."""
        for copy in plan.copies:
            for source, target in copy.pairs if copy.target_tier == DEVICE else ():
                self._fill(target, self.host[source])
                self.copied_in += 1

    def _fill(self, block: Block, slots: dict[tuple[int, int], Prefix]) -> None:
        for at in range(self._capacity.block_tokens):
            for layer in range(self._capacity.layers):
                self.slots.pop((block, at, layer), None)
                if (at, layer) in slots:
                    self.slots[block, at, layer] = slots[at, layer]

    def _go_on(self, work: Work) -> None:
        """Once the last layer has computed them, tokens are computed; drafts when they are accepted."""
        known, end = self.known[work.request_id], work.start + work.tokens - len(work.drafts)
        if work.layers is not None and work.layers[1] < self._capacity.layers:
            known.pending = (work.start, work.tokens, work.layers[1])
            return
        known.computed_once += range(work.start, end)
        assert len(set(known.computed_once)) == len(known.computed_once), "a position was computed twice"
        known.computed, known.pending = end, None
        self.computed_tokens += end - work.start
        known.drafts = work.drafts

    def _read(self, known: Known) -> None:
        """Attention reads every computed position through the table, and those on their way in the layers that they
        passed: it must find exactly its own prefix."""
        size = self._capacity.block_tokens
        start, tokens, passed = known.pending or (0, 0, 0)
        expected = prefixes([*known.token_ids[: max(known.computed, start + tokens)], *known.drafts])
        for layer in range(self._capacity.layers):
            end = start + tokens if layer < passed else known.computed + len(known.drafts)
            found = [self.slots.get((known.blocks[at // size], at % size, layer)) for at in range(end)]
            assert found == expected[:end], f"{known.request.id} reads KV that is not its own"

    def _sample(self, work: Work) -> Sampled:
        known, drawn = self.known[work.request_id], list[int]()
        while len(drawn) <= len(work.drafts) and (*drawn,) == work.drafts[: len(drawn)]:
            drawn.append(draw(prefixes([*known.token_ids, *drawn])[-1], self._capacity.vocab))
        known.token_ids += drawn
        known.computed_once += range(known.computed, known.computed + len(drawn) - 1)
        known.computed += len(drawn) - 1
        known.drafts = ()
        del known.blocks[-(-known.computed // self._capacity.block_tokens) :]
        self.drafted += len(work.drafts)
        self.accepted += len(drawn) - 1
        return Sampled(tuple(drawn))

    def _prompt_logprobs(self, work: Work) -> tuple[TokenLogprob, ...]:
        known = self.known[work.request_id]
        if known.request.sampling.prompt_logprobs is None or known.pending:
            return ()
        last = min(work.start + work.tokens, known.request.prompt_tokens - 1)
        return tuple(TokenLogprob(known.token_ids[at], -float(at)) for at in range(work.start + 1, last + 1))
