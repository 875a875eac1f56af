"""Facts about what happened, in the order it happened; observers fold them into metrics, logs and reports.

Every event carries `at_s`, the clock's time when it became true, so intervals are differences of one clock. Events are
tuples, because several are made in every step: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.core.step import Decode, Run, Work
from headrace.core.types import BlockKey, FinishReason, Request, RequestId, Usage


class Arrived(NamedTuple):
    at_s: float
    request_id: RequestId
    prompt_tokens: int
    max_new_tokens: int
    request: Request | None = None  # for those who record; None where the request itself stayed behind


class Admitted(NamedTuple):
    at_s: float
    request_id: RequestId
    cached_tokens: int  # KV found in the prefix cache
    queue_s: float  # since arrival, or since the preemption
    again: bool  # True when it had been admitted before and was preempted
    missed: BlockKey | None = None  # the name of the first block that was looked for in vain
    asked: bool = True  # whether this request looks for blocks of others at all


class Planned(NamedTuple):
    at_s: float
    step: int
    requests: int
    tokens: int
    running: int
    waiting: int
    used_blocks: int  # referenced by some request; cached but unreferenced blocks are free
    total_blocks: int
    others: tuple[Work, ...] = ()  # the rows beside the beat: prompts, and those who have drafts
    held: str = ""  # why the first in the queue could not start: "places", "memory" or "policy"; "" if it was not asked
    lane: int = 0


class Idle(NamedTuple):
    """One of several lanes was asked, policies included, and found nothing that it may do beside the others."""

    at_s: float
    lane: int


class StepDone(NamedTuple):
    """One step, or several repetitions of one."""

    at_s: float  # the end of the last one
    step: int
    seconds: float  # altogether
    tokens: int  # computed by each
    run: Run  # how many there were and how long each took
    used_blocks: int  # in the last repetition
    used_block_s: float  # the integral of the used blocks over these seconds


class Preempted(NamedTuple):
    at_s: float
    request_id: RequestId
    lost_tokens: int  # computed tokens whose KV must be found or computed again
    reason: str
    by: RequestId | None = None  # for whom it yielded


class Drew(NamedTuple):
    """Tokens drawn outside the beat: after a prefill, or after drafts. The inter-token latency of a request is the
    difference between two of its draws, whatever the event; tokens drawn together share it."""

    at_s: float
    request_ids: tuple[RequestId, ...]
    tokens: tuple[int, ...]  # drawn by each of them
    first: tuple[RequestId, ...]  # those for whom these were the first


class Decoded(NamedTuple):
    """The beat went on: one event because there may be hundreds of requests and thousands of repetitions. Each of
    them drew one token in each repetition; those who finished meanwhile, before this event, drew nothing."""

    at_s: float  # the end of the last repetition
    rows: tuple[Decode, ...]
    paused: tuple[RequestId, ...]  # who decodes but took no part
    requests: int  # who drew: the rows without those who left in flight
    run: Run


class Verified(NamedTuple):
    """What became of the drafts of one step."""

    at_s: float
    request_ids: tuple[RequestId, ...]
    drafted: tuple[int, ...]  # tokens, for each of them
    accepted: tuple[int, ...]  # of these


class Finished(NamedTuple):
    at_s: float
    request_id: RequestId
    reason: FinishReason
    usage: Usage
    arrival_s: float
    first_admitted_s: float | None  # None: never left the queue
    first_token_s: float | None  # None: no token was drawn
    max_new_tokens: int


class Rejected(NamedTuple):
    """The queue was full or the request could never fit; it has no other event."""

    at_s: float
    request_id: RequestId
    reason: str


class Lost(NamedTuple):
    """The executor is gone, with everything it held. A `Preempted` of each who ran follows."""

    at_s: float
    reason: str
    begun: bool  # a step was under way that may have been the reason


Event = (
    Arrived | Admitted | Planned | Idle | StepDone | Preempted | Drew | Decoded | Verified | Finished | Rejected | Lost
)
