"""The one contract between deciding and doing: a step is a value, and so is its result.

A plan says how many tokens of each request to compute, not which phase it is in: prefill, a chunk, decoding,
verification of drafts and recomputation are readings of one number. Plans send differences: a request's tokens and
block table travel once, when it is admitted, and grow by what each `Work` adds.

            known tokens of one request
    |<------ computed: KV in blocks ------>|<-- this step -->|<-- later -->|
    0                                    start         start+tokens      known
                                                             sample is true when start+tokens == known
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.core.types import Request, RequestId, TokenLogprob

Block = int  # index of one KV block in its tier


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request the executor has not seen, or has forgotten since it was preempted."""

    request: Request
    output_ids: tuple[int, ...]  # drawn before a preemption; empty the first time
    blocks: tuple[Block, ...]  # the block table so far: its first entries may be shared with other requests
    start: int  # tokens whose KV is already in those blocks (a prefix hit)


class Work(NamedTuple):
    """One request's share of a step. Rows are computed in the order of `StepPlan.work`. A tuple, because one is made
    per request and step: a frozen dataclass takes three times as long to make."""

    request_id: RequestId
    start: int  # position of the first token to compute: so many are in the KV already
    tokens: int  # how many to compute, at least 1
    sample: bool  # draw the next token from the last position's logits
    new_blocks: tuple[Block, ...] = ()  # appended to the block table before computing
    replaced_blocks: tuple[tuple[int, Block], ...] = ()  # (index in the table, block): adopted from another request
    layers: tuple[int, int] | None = None  # [first, last) layers to run; None is all of them
    lane: int = 0  # index into StepPlan.lanes


@dataclass(frozen=True, slots=True)
class Lane:
    """A share of the device with its own stream of steps."""

    share: float = 1.0  # of the device's compute units, in (0, 1]
    overlap: str = "serial"  # how its kernels interleave with other lanes: named by the cost model and the executor


@dataclass(frozen=True, slots=True)
class Copy:
    """Moves whole blocks between tiers or replicas; the step may not touch `target` before it is done."""

    source_tier: str
    target_tier: str
    pairs: tuple[tuple[Block, Block], ...]  # (block in the source tier, block in the target tier)


SERIAL = (Lane(),)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one step does. All KV writes of a layer come before its attention, so requests of one step may
    share blocks that the same step fills."""

    step: int  # counts from 0 and never repeats
    work: tuple[Work, ...]
    admitted: tuple[Admitted, ...] = ()  # before `work`
    released: tuple[RequestId, ...] = ()  # finished, aborted or preempted since the last plan: forget those you know
    copies: tuple[Copy, ...] = ()
    lanes: tuple[Lane, ...] = SERIAL

    @property
    def tokens(self) -> int:
        return sum(work.tokens for work in self.work)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one `Work` with `sample` drew. More than one token when drafts were accepted."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    step: int
    sampled: Mapping[RequestId, Sampled]
    prompt_logprobs: Mapping[RequestId, tuple[TokenLogprob, ...]] = field(default_factory=dict)
