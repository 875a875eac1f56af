"""Folds the events of one replica into records of its requests: who waited how long, what the replica did meanwhile,
who preempted whom. An `Observer`.

A step costs the same however many requests run or wait: a chronicle adds up what the replica did, and a request is the
difference of two readings, where it enters a stay and where it leaves it.

    prompts_s      ____/--------/____/---      readings of a request that waits from a to b: it waited b - a, and
                     a ^      b ^              while it did, prompts were computed for reading(b) - reading(a)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from headrace.core.events import (
    Admitted,
    Arrived,
    Drew,
    Event,
    Finished,
    Planned,
    Preempted,
    StepDone,
    Verified,
)
from headrace.core.explain.record import (
    DECODE,
    MEMORY,
    PLACES,
    POLICY,
    PREFILL,
    QUEUE,
    Chunk,
    Reading,
    Record,
    Yielded,
    begun,
)
from headrace.core.explain.seen import EVICTED, FIRST, NOT_ASKED, UNDER_WAY, UNNAMED, WHOLE, Seen
from headrace.core.step import Work
from headrace.core.types import Request, RequestId

STEPS_KEPT = 300  # for pages that draw them


class Beat(NamedTuple):
    """One step, or several repetitions of one, as pages draw it."""

    model: str
    step: int
    steps: int
    end_s: float
    seconds: float
    requests: int
    tokens: int  # of one repetition
    running: int
    waiting: int
    used_blocks: int
    total_blocks: int
    prompts: int  # requests beside the beat: whose prompts it computed, or who had drafts
    held: str  # why the first in the queue could not start, if it could not


class _Tenant:
    """What a replica has done for one tenant while any request of it was live."""

    __slots__ = ("live", "prompts_s", "slowed_s")

    def __init__(self) -> None:
        self.live = 0
        self.prompts_s = 0.0
        self.slowed_s = 0.0


class Chronicle:
    """Of one replica. `live` is shared with other replicas' chronicles, `retire` takes what has finished."""

    def __init__(self, model: str, live: dict[RequestId, Record], retire: Callable[[Record], None], seen: Seen) -> None:
        self.model = model
        self._live = live
        self._retire = retire
        self._seen = seen
        self._mine: set[RequestId] = set()
        self._asked: dict[RequestId, Request] = {}  # of those never admitted
        self._returning: set[RequestId] = set()  # were preempted, and have to catch up again
        self._tenants: dict[str, _Tenant] = {}
        self._waiting = 0
        self._flying: dict[int, Planned] = {}  # the last plan of each lane
        self._from_s: dict[int, float] = {}  # and what of it is not in the sums yet: from here on
        self._ring: deque[tuple[Planned, StepDone]] = deque(maxlen=STEPS_KEPT)
        self._turns = self._mixed = 0
        self._prompts_s = self._slowed_s = 0.0
        self._held_s = {PLACES: 0.0, MEMORY: 0.0, POLICY: 0.0}
        self._plain_s: float | None = None  # a step without prompts, lately
        self._fold: Mapping[type, Callable[[Any], None]] = {
            Planned: self._planned,
            StepDone: self._step,
            Drew: self._drew,
            Verified: self._verified,
            Arrived: self._arrived,
            Admitted: self._admitted,
            Preempted: self._preempted,
            Finished: self._finished,
        }

    # -- what others may ask -------------------------------------------------------------------------------------------

    def serves(self, record: Record) -> bool:
        return record.id in self._mine

    def reading(self, tenant: str, now: float) -> Reading:
        """The sums until now. Of a step in flight, the time that has passed counts like the whole of it will."""
        prompts_s, held = self._prompts_s, self._held_s
        account = self._tenants.get(tenant)
        own_s, slowed_s = (account.prompts_s, account.slowed_s) if account else (0.0, 0.0)
        places_s, memory_s, policy_s = held[PLACES], held[MEMORY], held[POLICY]
        for lane, plan in self._flying.items():
            if not (plan.others or plan.held):
                continue
            passed_s = max(0.0, now - self._from_s[lane])
            prompts = self._prompts(plan.others) if plan.others else []
            if prompts:
                prompts_s += passed_s
                tokens = sum(work.tokens for _, work in prompts)
                own_s += passed_s * sum(work.tokens for one, work in prompts if one.tenant == tenant) / tokens
            places_s += passed_s * (plan.held == PLACES)
            memory_s += passed_s * (plan.held == MEMORY)
            policy_s += passed_s * (plan.held == POLICY)
        sums = (prompts_s, own_s, self._slowed_s, slowed_s)
        return Reading(self._turns, self._mixed, *sums, places_s, memory_s, policy_s)

    def steps(self) -> list[Beat]:
        return [
            Beat(
                self.model,
                plan.step,
                done.run.steps,
                done.at_s,
                done.seconds,
                plan.requests,
                plan.tokens,
                plan.running,
                plan.waiting,
                done.used_blocks,
                plan.total_blocks,
                len(plan.others),
                plan.held,
            )
            for plan, done in self._ring
        ]

    def check(self) -> None:
        assert self._mine <= self._live.keys(), "a request ended unseen"
        mine = [self._live[name] for name in self._mine]
        assert self._waiting == sum(record.kind == QUEUE for record in mine), "the count of those who wait is off"
        live = {tenant: account.live for tenant, account in self._tenants.items()}
        assert live == {tenant: sum(one.tenant == tenant for one in mine) for tenant in live}, "a tenant is miscounted"
        assert set(live) == {one.tenant for one in mine}, "a tenant without requests is kept"
        assert self._asked.keys() <= self._mine and self._returning <= self._mine

    # -- events --------------------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        fold = self._fold.get(type(event))
        if fold is not None:
            fold(event)

    def _planned(self, event: Planned) -> None:
        self._flying[event.lane] = event
        self._from_s[event.lane] = event.at_s

    def _step(self, event: StepDone) -> None:
        lane, plan = self._of(event.step)
        if plan is None:
            return
        self._ring.append((plan, event))
        self._from_s[lane] = event.at_s
        if plan.held:
            self._held_s[plan.held] += event.seconds
        if plan.others:
            self._with_others(plan, event)
            del self._flying[lane]  # such a step is not repeated
        else:
            self._turns += event.run.steps
            self._plain_s = event.run.first_s

    def _of(self, step: int) -> tuple[int, Planned | None]:
        for lane, plan in self._flying.items():
            if plan.step == step:
                return lane, plan
        return 0, None

    def _prompts(self, others: tuple[Work, ...]) -> list[tuple[Record, Work]]:
        """Those beside the beat who catch up; the rest decodes, with drafts or without."""
        pairs = [(record, work) for work in others if (record := self._live.get(work.request_id)) is not None]
        return [(record, work) for record, work in pairs if record.kind == PREFILL]

    def _with_others(self, plan: Planned, event: StepDone) -> None:
        """A step with rows beside the beat. The whole step is the time of its prompts, by their tokens; where others
        decoded in it, they lost what it took longer than a step of their own."""
        prompts, seconds = self._prompts(plan.others), event.seconds
        decoding = plan.requests > len(prompts)
        self._turns += decoding
        if not prompts:
            return
        tokens = sum(work.tokens for _, work in prompts)
        slowed_s = self._slower(seconds, tokens, plan.tokens) if decoding else 0.0
        self._mixed += decoding
        self._prompts_s += seconds
        self._slowed_s += slowed_s
        for record, work in prompts:
            part = work.tokens / tokens
            account = self._tenants[record.tenant]
            account.prompts_s += seconds * part
            account.slowed_s += slowed_s * part
            done = work.tokens if work.layers is None or work.layers[0] == 0 else 0  # layers later are the same tokens
            record.computed(Chunk(plan.step, 1, event.at_s, seconds, seconds * part, slowed_s * part, done))

    def _slower(self, seconds: float, prompt_tokens: int, tokens: int) -> float:
        """Against the last step without prompts, or where there was none, by the tokens."""
        if self._plain_s is None:
            return seconds * prompt_tokens / max(1, tokens)
        return max(0.0, seconds - self._plain_s)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _arrived(self, event: Arrived) -> None:
        request = event.request
        if request is None:
            return
        self._tenants.setdefault(request.tenant, _Tenant()).live += 1
        line = (self._waiting, len(self._mine) - self._waiting)
        reading = self.reading(request.tenant, event.at_s)
        self._live[request.id] = begun(request, event.prompt_tokens, event.at_s, self.model, line, reading)
        self._mine.add(request.id)
        self._asked[request.id] = request
        self._waiting += 1

    def _admitted(self, event: Admitted) -> None:
        record = self._live.get(event.request_id)
        if record is None:
            return
        record.move(PREFILL, event.at_s, self.reading(record.tenant, event.at_s))
        self._waiting -= 1
        request = self._asked.pop(record.id, None)
        if request is not None:
            record.cached_tokens = event.cached_tokens
            record.missed = self._missed(event, request)
            self._seen.brought(request)

    def _missed(self, event: Admitted, request: Request) -> str:
        salted = self._seen.came(request)
        if not event.asked:
            return NOT_ASKED
        if event.missed is None:
            return WHOLE if event.cached_tokens else UNNAMED
        who = self._seen.who(event.missed)
        if who is not None:
            return UNDER_WAY if who in self._live else EVICTED
        return salted if salted is not None and not event.cached_tokens else FIRST

    def _drew(self, event: Drew) -> None:
        for request_id in event.first:
            self._decodes(request_id, event.at_s)
        if self._returning:
            for request_id in self._returning.intersection(event.request_ids):
                self._decodes(request_id, event.at_s)

    def _decodes(self, request_id: RequestId, now: float) -> None:
        record = self._live.get(request_id)
        if record is None or record.kind != PREFILL:
            return
        self._returning.discard(request_id)
        if record.first_token_s is None:
            record.first_token_s = now
        record.move(DECODE, now, self.reading(record.tenant, now))

    def _verified(self, event: Verified) -> None:
        live = self._live
        for request_id, drafted, accepted in zip(event.request_ids, event.drafted, event.accepted, strict=True):
            record = live.get(request_id)
            if record is not None:
                record.drafted_tokens += drafted
                record.accepted_tokens += accepted

    def _preempted(self, event: Preempted) -> None:
        record = self._live.get(event.request_id)
        if record is None:
            return
        record.preempted(Yielded(event.at_s, event.reason, event.by, event.lost_tokens))
        if record.kind != QUEUE:
            self._waiting += 1
        record.move(QUEUE, event.at_s, self.reading(record.tenant, event.at_s))
        self._returning.add(record.id)

    def _finished(self, event: Finished) -> None:
        record = self._live.get(event.request_id)
        if record is None:
            return
        self._waiting -= record.kind == QUEUE
        record.leave(event.at_s, self.reading(record.tenant, event.at_s))
        record.finish, record.end_s = event.reason, event.at_s
        record.output_tokens, record.first_token_s = event.usage.output_tokens, event.first_token_s
        self._mine.discard(record.id)
        self._returning.discard(record.id)
        self._asked.pop(record.id, None)
        account = self._tenants[record.tenant]
        account.live -= 1
        if not account.live:
            del self._tenants[record.tenant]
        self._retire(record)
