"""What one viewer may know of one request: a record and its neighbours become an `Explanation`. Other tenants keep
their names and the ids of their requests; an admin sees all. Times are seconds since the request came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.core.explain.fold import Explanations
from headrace.core.explain.record import DECODE, PREFILL, QUEUE, Reading, Record, Stay, Yielded
from headrace.core.types import RequestId

_MOST_NAMED = 3  # prompts that a phase blames
_LEAST_S = 0.001  # for which nobody is blamed


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who asks."""

    tenant: str = ""
    admin: bool = False

    def may_see(self, tenant: str) -> bool:
        return self.admin or tenant == self.tenant


@dataclass(frozen=True, slots=True)
class Other:
    """Another request, as far as it may be known."""

    whose: str  # "own": of the same tenant; "other": of another
    request_id: RequestId | None = None  # None where it is nobody's business
    tenant: str | None = None  # its name, for an admin
    prompt_tokens: int | None = None  # None: too long ago to be known


@dataclass(frozen=True, slots=True)
class Cause:
    """Time that went to the prompt of another request."""

    other: Other
    seconds: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A stay in the queue, in prefill or in decoding, and what the replica did meanwhile."""

    kind: str
    begin_s: float
    seconds: float
    steps: int  # in decoding: in which it drew
    steps_with_prompts: int  # of these, longer because prompts were computed beside
    prompts_s: float  # in steps that computed prompts of others
    others_prompts_s: float  # of that, of other tenants
    slowed_s: float  # decoding: by which prompts of others made it longer
    others_slowed_s: float  # of that, of other tenants
    places_s: float  # queue: all places for running requests were taken
    memory_s: float  # queue: too little memory was free
    policy_s: float  # queue: the admission policy held it back
    causes: tuple[Cause, ...]  # the prompts that took most of it, the worst first


@dataclass(frozen=True, slots=True)
class Computed:
    """A chunk of the prompt."""

    step: int
    steps: int
    begin_s: float
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Yield:
    """A preemption."""

    at_s: float
    reason: str
    to: Other | None
    lost_tokens: int


@dataclass(frozen=True, slots=True)
class Explanation:
    id: RequestId
    model: str
    tenant: str
    state: str  # "waiting", "prefilling", "decoding" or "finished"
    prompt_tokens: int
    cached_tokens: int
    missed: str  # why no more was found in the cache; see `seen`
    output_tokens: int
    max_new_tokens: int
    ahead: int  # requests that waited when it came
    running: int
    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    ttft_s: float | None
    phases: tuple[Phase, ...]
    chunks: tuple[Computed, ...]
    preemptions: int
    yields: tuple[Yield, ...]
    drafted_tokens: int
    accepted_tokens: int
    finish: str | None


@dataclass(frozen=True, slots=True)
class Times:
    """Where the time went so far, in sums. What an answer's header and the log say."""

    queue_s: float
    prefill_s: float
    decode_s: float
    preemptions: int
    waited_prompts_s: float  # in the queue, while prompts of others were computed
    others_prompts_s: float  # of that, of other tenants
    places_s: float
    memory_s: float
    policy_s: float
    slowed_s: float


def times(book: Explanations, record: Record, now: float) -> Times:
    """O(stays)."""
    spent = {QUEUE: 0.0, PREFILL: 0.0, DECODE: 0.0}
    waited, slowed_s = Reading(), 0.0
    for stay in record.stays:
        seconds, meanwhile = _seen_until(book, record, stay, now)
        spent[stay.kind] += seconds
        if stay.kind == QUEUE:
            waited = waited.plus(meanwhile)
        elif stay.kind == DECODE:
            slowed_s += meanwhile.slowed_s
    queued = (waited.prompts_s, waited.prompts_s - waited.own_prompts_s, *waited[-3:])
    return Times(spent[QUEUE], spent[PREFILL], spent[DECODE], record.preemptions, *queued, slowed_s)


def output_tokens(book: Explanations, record: Record, now: float) -> int:
    """Drawn so far; of a live request, one in each step in which it decoded and what came of drafts."""
    if record.finish is not None or record.first_token_s is None:
        return record.output_tokens
    decodes = [stay for stay in record.stays if stay.kind == DECODE]
    return sum(1 + _seen_until(book, record, stay, now)[1].turns for stay in decodes) + record.accepted_tokens


def state(record: Record) -> str:
    if record.finish is not None:
        return "finished"
    return {QUEUE: "waiting", PREFILL: "prefilling", DECODE: "decoding"}[record.kind]


def explain(book: Explanations, record: Record, viewer: Viewer, now: float) -> Explanation:
    """Everything known of a request, until now if it is live. O(requests remembered)."""
    others = [one for one in book.records() if one is not record and one.model == record.model and one.chunks]
    spent = times(book, record, now)
    origin_s, end_s = record.arrival_s, now if record.end_s is None else record.end_s
    return Explanation(
        id=record.id,
        model=record.model,
        tenant=record.tenant,
        state=state(record),
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        missed=record.missed,
        output_tokens=output_tokens(book, record, now),
        max_new_tokens=record.max_new_tokens,
        ahead=record.ahead,
        running=record.running,
        queue_s=spent.queue_s,
        prefill_s=spent.prefill_s,
        decode_s=spent.decode_s,
        total_s=end_s - origin_s,
        ttft_s=None if record.first_token_s is None else record.first_token_s - origin_s,
        phases=tuple(_phase(book, record, stay, others, viewer, now) for stay in record.stays),
        chunks=tuple(
            Computed(chunk.step, chunk.steps, chunk.begin_s - origin_s, chunk.seconds, chunk.tokens)
            for chunk in record.chunks
        ),
        preemptions=record.preemptions,
        yields=tuple(_yield(book, record, one, viewer) for one in record.yielded),
        drafted_tokens=record.drafted_tokens,
        accepted_tokens=record.accepted_tokens,
        finish=None if record.finish is None else record.finish.value,
    )


def _seen_until(book: Explanations, record: Record, stay: Stay, now: float) -> tuple[float, Reading]:
    """How long a stay has been and what the replica did meanwhile."""
    if stay.end_s is not None:
        return stay.end_s - stay.begin_s, stay.meanwhile
    return max(0.0, now - stay.begin_s), book.reading(record, now).since(stay.before)


def _phase(
    book: Explanations, record: Record, stay: Stay, others: Sequence[Record], viewer: Viewer, now: float
) -> Phase:
    seconds, meanwhile = _seen_until(book, record, stay, now)
    end_s = stay.begin_s + seconds
    mine_s = sum(one.overlap(stay.begin_s, end_s) * one.share_s for one in record.chunks)  # only in prefill
    prompts_s = max(0.0, meanwhile.prompts_s - mine_s)
    return Phase(
        kind=stay.kind,
        begin_s=stay.begin_s - record.arrival_s,
        seconds=seconds,
        steps=meanwhile.turns,
        steps_with_prompts=meanwhile.mixed,
        prompts_s=prompts_s,
        others_prompts_s=max(0.0, meanwhile.prompts_s - meanwhile.own_prompts_s),
        slowed_s=meanwhile.slowed_s,
        others_slowed_s=max(0.0, meanwhile.slowed_s - meanwhile.own_slowed_s),
        places_s=meanwhile.places_s,
        memory_s=meanwhile.memory_s,
        policy_s=meanwhile.policy_s,
        causes=_causes(record, stay.kind, (stay.begin_s, end_s), others, viewer),
    )


def _causes(
    record: Record, kind: str, window: tuple[float, float], others: Iterable[Record], viewer: Viewer
) -> tuple[Cause, ...]:
    """Whose prompts were computed in this window, or made its decoding slow; the worst of them. Chunks that are partly
    in it count for that part."""
    blamed: list[tuple[float, Record]] = []
    for other in others:
        if other.chunks[-1].end_s <= window[0] or other.chunks[0].begin_s >= window[1]:
            continue
        parts = [(one.overlap(*window), one.slowed_s if kind == DECODE else one.share_s) for one in other.chunks]
        seconds = sum(part * cost_s for part, cost_s in parts)
        if seconds >= _LEAST_S:
            blamed.append((seconds, other))
    blamed.sort(key=lambda pair: -pair[0])
    return tuple(Cause(_other(record, one, viewer), seconds) for seconds, one in blamed[:_MOST_NAMED])


def _other(record: Record, other: Record, viewer: Viewer) -> Other:
    own = other.tenant == record.tenant
    seen = viewer.may_see(other.tenant)
    return Other(
        "own" if own else "other",
        other.id if seen else None,
        other.tenant if viewer.admin else None,
        other.prompt_tokens,
    )


def _yield(book: Explanations, record: Record, one: Yielded, viewer: Viewer) -> Yield:
    to = None if one.to is None else book.find(one.to)
    other = None if to is None else _other(record, to, viewer)
    return Yield(one.at_s - record.arrival_s, one.reason, other, one.lost_tokens)
