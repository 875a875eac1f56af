"""Ordering x Admission x BatchFormer x Preemption: who is next, who may start, what a step computes, who yields.

Each is a plain function over read-only views; the dicts at the end name them, and a third party passes a function
instead of a name. Policies choose, the scheduler guarantees: whatever they say, blocks are never overdrawn, nobody is
planned twice in a step, and the first request in the ordering progresses.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from headrace.core.config import EngineSettings
from headrace.core.types import HeadraceError, Request

AGEING_S = 10.0  # how much earlier one level of priority makes a request look
PRIORITY_LEVELS = 100  # priorities beyond plus or minus this count as this
WATERMARK = 0.01  # share of all blocks that admission leaves free, so that running requests can grow

P = TypeVar("P")


class RequestView(Protocol):
    """What a policy may know about one request. It is the scheduler's live object: read it, don't keep it."""

    @property
    def request(self) -> Request: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def known_tokens(self) -> int:
        """Prompt and output so far."""
        ...

    @property
    def computed_tokens(self) -> int: ...

    @property
    def limit_tokens(self) -> int:
        """The most prompt and output it may come to."""
        ...

    @property
    def held_blocks(self) -> int: ...

    @property
    def cached_blocks(self) -> int:
        """For the request that asks for admission: blocks of its prefix that running requests hold already."""
        ...

    @property
    def queued_s(self) -> float: ...

    @property
    def preemptions(self) -> int: ...


class PoolView(NamedTuple):
    """The KV memory at the moment one request asks for admission."""

    total_blocks: int
    free_blocks: int  # held by nobody, cached ones included
    block_tokens: int
    promised_blocks: int  # of the free ones, what running requests need for tokens they know but have not computed
    reserved_blocks: int  # what running requests would hold at their longest if they shared nothing
    running: Sequence[RequestView]

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


class BatchView(NamedTuple):
    """Everybody who could be in this step, each group in the order of the ordering."""

    now: float
    token_budget: int
    decoding: Sequence[RequestView]  # one token behind
    prefilling: Sequence[RequestView]  # running, with more to catch up
    waiting: Sequence[RequestView]  # not admitted, or preempted


class Share(NamedTuple):
    """A wish: compute these requests, in this order, with at most `tokens` altogether. Who waits asks for admission;
    the first who is refused ends the share, so that nobody overtakes. `whole` requests start only if all their missing
    tokens fit, or if the step is empty."""

    requests: Sequence[RequestView]
    tokens: int
    whole: bool = False


Ordering = Callable[[RequestView, float], float]  # (request, now) -> key: smaller goes first, ties by arrival
Admission = Callable[[RequestView, PoolView], bool]
BatchFormer = Callable[[BatchView], Generator[Share, int, None]]  # yields wishes, receives the tokens they got
Preemption = Callable[[Sequence[RequestView], RequestView], RequestView]  # (those behind it in order, the needy)


def fcfs(request: RequestView, now: float) -> float:
    """First come, first served. Preempted requests keep their place."""
    return request.request.arrival_s


def priority(request: RequestView, now: float) -> float:
    """Larger priority first, then arrival; waiting makes up for priority at one level per AGEING_S seconds.

    Effective priority grows as p + waited / AGEING_S, and between two requests the clock cancels out, so the order is
    fixed at arrival. The bound: nobody who arrives more than (q - p) * AGEING_S later with priority q goes first, so at
    most 2 * PRIORITY_LEVELS * AGEING_S seconds of later arrivals ever overtake a request.
    """
    level = max(-PRIORITY_LEVELS, min(PRIORITY_LEVELS, request.request.priority))
    return request.request.arrival_s - level * AGEING_S


def free_blocks(request: RequestView, pool: PoolView) -> bool:
    """All known tokens must fit into what is free, beside what is promised and the watermark (vLLM, 1 %)."""
    watermark = WATERMARK * pool.total_blocks
    missing = pool.blocks_for(request.known_tokens) - request.cached_blocks
    return missing + pool.promised_blocks + watermark <= pool.free_blocks


def reserve_all(request: RequestView, pool: PoolView) -> bool:
    """The longest it may become must fit beside the longest all others may become, so nobody is ever preempted (Orca).
    The last token drawn is never computed and needs no place."""
    return pool.blocks_for(request.limit_tokens - 1) + pool.reserved_blocks <= pool.total_blocks


def chunked(batch: BatchView) -> Generator[Share, int, None]:
    """Decodes first and always, then unfinished prefills, then new requests, under the token budget: a decode never
    waits for a prompt, so the time between tokens is that of one budget (Sarathi-Serve's stall-free batching)."""
    left = batch.token_budget
    left -= yield Share(batch.decoding, len(batch.decoding))
    left -= yield Share(batch.prefilling, left)
    yield Share(batch.waiting, left)


def prefill_first(batch: BatchView) -> Generator[Share, int, None]:
    """Whole prompts as long as any may start, decodes only when none may (vLLM before 1.0): the soonest first token,
    paid for by everybody else's next one."""
    granted = yield Share(batch.prefilling, batch.token_budget, whole=True)
    granted += yield Share(batch.waiting, batch.token_budget - granted, whole=True)
    if not granted:
        yield Share(batch.decoding, len(batch.decoding))


def last_arrived(behind: Sequence[RequestView], needy: RequestView) -> RequestView:
    """The last in the ordering."""
    return behind[-1]


ORDERINGS: Mapping[str, Ordering] = {"fcfs": fcfs, "priority": priority}
SETTLED: frozenset[Ordering] = frozenset({fcfs, priority})  # keys that never change: sorted once, on arrival
ADMISSIONS: Mapping[str, Admission] = {"free-blocks": free_blocks, "reserve-all": reserve_all}
BATCHES: Mapping[str, BatchFormer] = {"chunked": chunked, "prefill-first": prefill_first}
PREEMPTIONS: Mapping[str, Preemption] = {"last-arrived": last_arrived}


# Who decide the same again while the same requests decode, nobody arrives and free blocks only become fewer: the
# simulator may then take many steps at once. Leave a policy out that looks at the clock or at how far others are.
REPEATABLE: frozenset[object] = frozenset({free_blocks, reserve_all, chunked, prefill_first})


@dataclass(frozen=True, slots=True)
class Policies:
    """One choice of each. `dataclasses.replace(choose(settings), ordering=mine)` plugs in a function of your own."""

    ordering: Ordering
    admission: Admission
    batch: BatchFormer
    preemption: Preemption


def choose(settings: EngineSettings) -> Policies:
    """The policies that the settings name; raises HeadraceError that lists the names there are."""
    return Policies(
        _named(ORDERINGS, settings.ordering, "ordering"),
        _named(ADMISSIONS, settings.admission, "admission"),
        _named(BATCHES, settings.batch, "batch"),
        _named(PREEMPTIONS, settings.preemption, "preemption"),
    )


def _named(policies: Mapping[str, P], name: str, setting: str) -> P:
    if name not in policies:
        raise HeadraceError(f"{setting} {name!r} is unknown; choose one of {', '.join(policies)}")
    return policies[name]


def token_budget(
    target_s: float, base_s: float, seconds_per_token: float, *, floor: int = 16, ceiling: int = 8192
) -> int:
    """The largest number of tokens whose step, predicted as base_s + tokens * seconds_per_token, stays within the
    inter-token target (Sarathi-Serve's choice of budget). Never below `floor`, or prompts would not move at all on a
    device that misses the target anyway; never above `ceiling`, which bounds the memory of activations."""
    if seconds_per_token <= 0:
        return ceiling
    return max(floor, min(ceiling, int((target_s - base_s) / seconds_per_token)))
