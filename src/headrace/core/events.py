"""Facts about what happened, in the order it happened; observers fold them into metrics, logs and reports.

Every event carries `at_s`, the clock's time when it became true, so intervals are differences of one clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.types import FinishReason, Request, RequestId, Usage


@dataclass(frozen=True, slots=True)
class Arrived:
    at_s: float
    request_id: RequestId
    prompt_tokens: int
    max_new_tokens: int
    request: Request | None = None  # for those who record; None where the request itself stayed behind


@dataclass(frozen=True, slots=True)
class Admitted:
    at_s: float
    request_id: RequestId
    cached_tokens: int  # KV found in the prefix cache
    queue_s: float  # since arrival, or since the preemption
    again: bool  # True when it had been admitted before and was preempted


@dataclass(frozen=True, slots=True)
class Planned:
    at_s: float
    step: int
    requests: int
    tokens: int
    running: int
    waiting: int
    used_blocks: int  # referenced by some request; cached but unreferenced blocks are free
    total_blocks: int


@dataclass(frozen=True, slots=True)
class StepDone:
    at_s: float
    step: int
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Preempted:
    at_s: float
    request_id: RequestId
    lost_tokens: int  # computed tokens whose KV must be found or computed again
    reason: str


@dataclass(frozen=True, slots=True)
class Drew:
    """The tokens that one step drew, in one event because there may be hundreds. The inter-token latency of a request
    is the difference of two of these."""

    at_s: float
    request_ids: tuple[RequestId, ...]
    tokens: tuple[int, ...]  # drawn by each of them
    first: tuple[RequestId, ...]  # those for whom these were the first


@dataclass(frozen=True, slots=True)
class Finished:
    at_s: float
    request_id: RequestId
    reason: FinishReason
    usage: Usage
    arrival_s: float
    first_admitted_s: float | None  # None: never left the queue
    first_token_s: float | None  # None: no token was drawn
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The queue was full or the request could never fit; it has no other event."""

    at_s: float
    request_id: RequestId
    reason: str


Event = Arrived | Admitted | Planned | StepDone | Preempted | Drew | Finished | Rejected
