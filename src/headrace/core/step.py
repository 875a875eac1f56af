"""The one contract between deciding and doing: a step is a value, and so is its result.

A plan says how many tokens of each request to compute, not which phase it is in: prefill, a chunk, decoding,
verification of drafts and recomputation are readings of one number. Plans send differences: a request's tokens and
block table travel once, when it is admitted, and grow by what each `Work` adds. What every step makes is a tuple: a
frozen dataclass takes three times as long to make.

            known tokens of one request
    |<------ computed: KV in blocks ------>|<-- this step -->|<-- later -->|
    0                                    start         start+tokens      known
                                                             sample is true when start+tokens == known

Work may go through the model a few layers at a time. The same tokens then come back in later steps, each going on at
the layer where the one before ended, until the last layer computes them; what lies between layers, the executor
remembers. Work from layer 0 on, or a release, makes it forget that.

Work may go beyond the known tokens, on drafts: guesses of what will be drawn. The token after the last known one is
drawn as always; while it is the next draft, the one after that draft is drawn too, from logits that are there already.

    tokens     | known ... t | d1  d2  d3 |      drawn after t: d1, after d1: d2, after d2: x. So sampled are d1, d2, x
    start ---->'             '- drafts ---'      the next work starts at the position of x, where d3 was

What was computed for the drafts that were not drawn is garbage: the next work writes over it, and blocks that hold
nothing else leave the end of the block table, here as in the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from headrace.core.types import Request, RequestId, TokenLogprob

Block = int  # index of one KV block in its tier
DEVICE, HOST = "device", "host"  # the tiers there are: where steps compute, and the host's memory behind it


class Admitted(NamedTuple):
    """A request the executor has not seen, or has forgotten since it was preempted. It has work in this plan, or in a
    later one if some of its blocks are copied in by this one."""

    request: Request
    output_ids: tuple[int, ...]  # drawn before a preemption; empty the first time
    blocks: tuple[Block, ...]  # the block table so far: its first entries may be shared with other requests
    start: int  # tokens whose KV is already in those blocks (a prefix hit)


class Work(NamedTuple):
    """One request's share of a step. Rows are computed in the order of `StepPlan.work`."""

    request_id: RequestId
    start: int  # position of the first token to compute: so many are in the KV already
    tokens: int  # how many to compute, at least 1, the drafts among them
    sample: bool  # draw the next token from the last known position's logits; only with the last layer
    new_blocks: tuple[Block, ...] = ()  # appended to the block table before computing; with the first layers only
    replaced_blocks: tuple[tuple[int, Block], ...] = ()  # (index in the table, block): adopted from another request
    layers: tuple[int, int] | None = None  # [first, last) layers to run; None is all of them
    drafts: tuple[int, ...] = ()  # guesses of the tokens after the known ones; only with `sample` and all layers


class Decode(NamedTuple):
    """A request that decodes: in beat b it computes the token at position b + offset. The beat counts on and the
    offset stays, so nothing has to be touched for a request that does nothing but go on."""

    request_id: RequestId
    offset: int


class Beat(NamedTuple):
    """Everybody who decodes computes one token and samples the next.

         beat 7   8   9  10
    a         o   o   o   o      offset 33: positions 40, 41, 42, 43
    b             o   o   o      offset 12: positions 20, 21, 22, after its prefill ended beside beat 7
    """

    number: int  # counts from 0 over the life of the scheduler; a plan without one skips no number
    rows: tuple[Decode, ...]
    context_tokens: int  # the sum of the rows' positions
    new_blocks: Mapping[RequestId, tuple[Block, ...]]  # appended to their block tables before computing
    paused: tuple[RequestId, ...] = ()  # who decodes but not in this beat, for want of a block or because it goes alone
    longest_tokens: int = 0  # the highest position of all who decode, the paused among them

    def work(self) -> list[Work]:
        number, blocks = self.number, self.new_blocks
        return [Work(name, number + offset, 1, True, blocks.get(name, ())) for name, offset in self.rows]


@dataclass(frozen=True, slots=True)
class Lane:
    """A share of the device with its own stream of steps. Shares of several lanes may add up to more than 1; where
    steps meet they then share what both were promised.

        lane 0   |== a prompt ==|==== prompts ====|     those who catch up
        lane 1   |- beat -|- beat -|- beat -|- beat -|  everybody who decodes; who caught up joins at the next beat
    """

    share: float = 1.0  # of the device's compute units, in (0, 1]
    overlap: str = "serial"  # how its kernels interleave with other lanes: named by the cost model and the executor


@dataclass(frozen=True, slots=True)
class Copy:
    """Moves whole blocks between tiers, beside the step's work, and is over when the step is.

        to the host     done before anything of this step is written to the same device block: a later copy's, or a
                        work's. `StepPlan.overwrites` tells whether a work waits for it
        to the device   after the copies to the host, from which it may read. No work of this plan reads its targets

    Neighbours in the host's memory stand next to each other: a run of them, on both sides, is one large copy.
    """

    source_tier: str
    target_tier: str
    pairs: tuple[tuple[Block, Block], ...]  # (block in the source tier, block in the target tier)


SERIAL = (Lane(),)


class StepPlan(NamedTuple):
    """Everything one step does. All KV writes of a layer come before its attention, so requests of one step may
    share blocks that the same step fills.

    A plan with a beat and nothing else may stand for several steps: nothing that the scheduler knows will change the
    batch. An executor whose `Capacity.steps` is more than one, which therefore needs no block tables, may repeat the
    beat until a request draws a stop token, until a repetition ends at or after `until_s`, or until it is interrupted.
    """

    step: int  # counts from 0 and never repeats, but for repetitions
    others: tuple[Work, ...]  # the rows that are not in the beat
    admitted: tuple[Admitted, ...] = ()  # before `work`
    released: tuple[RequestId, ...] = ()  # finished, aborted or preempted since the last plan: forget those you know
    copies: tuple[Copy, ...] = ()
    lanes: tuple[Lane, ...] = SERIAL
    lane: int = 0  # the one of them that this step belongs to; the others' shares are what was last told
    beat: Beat | None = None
    steps: int = 1  # the most repetitions of the beat
    until_s: float = math.inf

    @property
    def work(self) -> tuple[Work, ...]:
        """Every row of one repetition, made when somebody asks, O(rows): ask once."""
        return self.others if self.beat is None else (*self.beat.work(), *self.others)

    @property
    def overwrites(self) -> bool:
        """Whether some work takes a block that this plan copies out, and so cannot begin beside the copy."""
        left = {source for copy in self.copies if copy.source_tier == DEVICE for source, _ in copy.pairs}
        return bool(left) and any(not left.isdisjoint(work.new_blocks) for work in self.work)

    @property
    def tokens(self) -> int:
        """Of one repetition."""
        return sum(work.tokens for work in self.others) + (len(self.beat.rows) if self.beat else 0)


class Run(NamedTuple):
    """Consecutive repetitions of one step: repetition i took first_s + i * slope_s seconds."""

    steps: int
    first_s: float
    slope_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.first_s if self.steps == 1 else self.until(self.steps)

    def until(self, steps: int) -> float:
        """Seconds of the first `steps` repetitions."""
        return steps * self.first_s + self.slope_s * (steps * (steps - 1) / 2)

    def after(self, steps: int) -> Run:
        """What is left after the first `steps` repetitions."""
        return Run(self.steps - steps, self.first_s + steps * self.slope_s, self.slope_s)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one `Work` with `sample` drew: the drafts that were accepted, and the one token after them."""

    token_ids: tuple[int, ...]  # at least one, at most one more than there were drafts
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, when asked for


class StepResult(NamedTuple):
    """What one step did, or some repetitions of one."""

    step: int
    sampled: Mapping[RequestId, Sampled]  # in the last repetition
    prompt_logprobs: Mapping[RequestId, tuple[TokenLogprob, ...]] = MappingProxyType({})
    others_drew: int | None = None  # the token of every row that samples and is not in `sampled`, if there may be such
    run: Run | None = None  # the repetitions and their durations; None: one, which took as long as it took
    failed: Mapping[RequestId, str] = MappingProxyType({})  # who sampled and cannot go on, and why
