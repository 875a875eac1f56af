"""What is kept of one request while it lives and for a while after: its stays in the queue, in prefill and in decoding,
with what the replica did meanwhile. Every list is bounded: where it would grow too long, neighbours become one.

    stays    | queue | prefill |   decode   | queue | prefill |  decode  |
                                     preempted ^
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.core.types import FinishReason, Request, RequestId

QUEUE, PREFILL, DECODE = "queue", "prefill", "decode"
PLACES, MEMORY, POLICY = "places", "memory", "policy"  # why the first in the queue could not start
_MOST_CHUNKS = 64
_MOST_STAYS = 48
_MOST_PREEMPTIONS = 16


class Reading(NamedTuple):
    """What one replica has done so far, and what of it for one tenant. Differences of two readings are what happened
    between them."""

    turns: int = 0  # steps in which somebody decoded
    mixed: int = 0  # of these, with prompts beside
    prompts_s: float = 0.0  # in steps that computed prompts
    own_prompts_s: float = 0.0  # of that, for the tenant: each prompt has its part by its tokens
    slowed_s: float = 0.0  # by which mixed steps were longer than a step without prompts
    own_slowed_s: float = 0.0
    places_s: float = 0.0  # in steps in which the next one found all places for running requests taken
    memory_s: float = 0.0  # ... or not enough free memory
    policy_s: float = 0.0  # ... or was held back by the admission policy

    def since(self, before: Reading) -> Reading:
        return Reading._make(now - then for now, then in zip(self, before, strict=True))

    def plus(self, other: Reading) -> Reading:
        return Reading._make(one + another for one, another in zip(self, other, strict=True))


class Chunk(NamedTuple):
    """Tokens of one prompt in one step, or in neighbouring ones."""

    step: int  # the first
    steps: int
    end_s: float
    seconds: float  # of the steps
    share_s: float  # of these, the part that falls to this prompt among those computed together
    slowed_s: float  # by which it made others' tokens later
    tokens: int

    @property
    def begin_s(self) -> float:
        return self.end_s - self.seconds

    def overlap(self, begin_s: float, end_s: float) -> float:
        """Which part of it falls between these moments, 0 to 1."""
        inside_s = min(self.end_s, end_s) - max(self.begin_s, begin_s)
        return min(1.0, inside_s / self.seconds) if inside_s > 0 and self.seconds > 0 else 0.0

    def joined(self, later: Chunk) -> Chunk:
        return Chunk(
            self.step,
            self.steps + later.steps,
            later.end_s,
            later.end_s - self.begin_s,
            self.share_s + later.share_s,
            self.slowed_s + later.slowed_s,
            self.tokens + later.tokens,
        )


@dataclass(slots=True)
class Stay:
    """One stay in the queue, in prefill or in decoding."""

    kind: str
    begin_s: float
    before: Reading
    end_s: float | None = None  # None: it is there now
    meanwhile: Reading = Reading()  # with `end_s`


class Yielded(NamedTuple):
    """It gave its memory away."""

    at_s: float
    reason: str
    to: RequestId | None  # who took it, if somebody did
    lost_tokens: int


@dataclass(slots=True)
class Record:
    """One request. `request` itself is not kept: prompts are nobody's business here."""

    id: RequestId
    model: str
    tenant: str
    priority: int
    prompt_tokens: int
    max_new_tokens: int
    arrival_s: float
    ahead: int  # requests that waited when it came
    running: int  # and that were being computed
    stays: list[Stay]
    chunks: list[Chunk] = field(default_factory=list)
    yielded: list[Yielded] = field(default_factory=list)
    preemptions: int = 0
    cached_tokens: int = 0
    missed: str = ""  # why no more was found; see `seen`
    first_token_s: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    output_tokens: int = 0  # with `finish`
    finish: FinishReason | None = None
    end_s: float | None = None  # with `finish`

    @property
    def kind(self) -> str:
        return self.stays[-1].kind

    def move(self, kind: str, now: float, reading: Reading) -> None:
        """Leave the stay it is in and begin another."""
        self.leave(now, reading)
        if len(self.stays) >= _MOST_STAYS:
            self._merge()
        self.stays.append(Stay(kind, now, reading))

    def leave(self, now: float, reading: Reading) -> None:
        stay = self.stays[-1]
        stay.end_s, stay.meanwhile = now, reading.since(stay.before)

    def computed(self, chunk: Chunk) -> None:
        chunks = self.chunks
        chunks.append(chunk)
        if len(chunks) >= _MOST_CHUNKS:  # half as many, so that this happens seldom
            self.chunks = [chunks[at].joined(chunks[at + 1]) for at in range(0, len(chunks) - 1, 2)]

    def preempted(self, what: Yielded) -> None:
        self.preemptions += 1
        if len(self.yielded) < _MOST_PREEMPTIONS:
            self.yielded.append(what)

    def _merge(self) -> None:
        """The oldest round after the first becomes part of the one before: queue with queue, and so on. What is lost
        is where one ended and the other began."""
        kept: dict[str, Stay] = {}
        middle, rest = self.stays[: _MOST_STAYS // 2], self.stays[_MOST_STAYS // 2 :]
        for stay in middle:
            first = kept.setdefault(stay.kind, stay)
            if first is not stay:
                assert stay.end_s is not None and first.end_s is not None, "only the last stay is open"
                first.end_s += stay.end_s - stay.begin_s
                first.meanwhile = first.meanwhile.plus(stay.meanwhile)
        self.stays = [*kept.values(), *rest]


def begun(request: Request, prompt_tokens: int, now: float, model: str, line: tuple[int, int], at: Reading) -> Record:
    """A request that has just come; `line` is how many waited and how many were being computed."""
    ahead, running = line
    return Record(
        request.id,
        model,
        request.tenant,
        request.priority,
        prompt_tokens,
        request.max_new_tokens,
        now,
        ahead,
        running,
        [Stay(QUEUE, now, at)],
    )
