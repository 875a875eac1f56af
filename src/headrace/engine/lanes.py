"""The steps in flight, at most one in each lane. With one lane they follow each other; with two, lane CATCH_UP serves
those who wait or catch up and lane BEAT everybody who decodes, so no request is ever wanted by both. Owns which steps
are in flight and what waits for their ends; a policy of `policies.lanes` sets the shares.

    CATCH_UP  |==== r computes its prompt ====|         nothing of r moves until its step ends: it is nobody's victim,
    BEAT      |- beat -|- beat -|-- beat --|-- r too    and if it is aborted its blocks are free only then
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.core.step import SERIAL, Admitted, Beat, Lane, Work
from headrace.core.types import BlockKey, RequestId
from headrace.engine.policies.lanes import LanesView, Load, SharePolicy, Shares
from headrace.engine.progress import Progress, State

CATCH_UP, BEAT = 0, 1
EVERYBODY = frozenset(State)
_SERVED = (frozenset({State.WAITING, State.PREFILLING}), frozenset({State.DECODING}))


@dataclass(slots=True)
class Step:
    """One step while it is planned, and then until it is committed."""

    number: int
    now: float
    token_budget: int
    decoding: tuple[Progress, ...]
    beat: Beat | None = None
    members: tuple[Progress, ...] = ()  # who is in the beat, in order
    others: list[Work] = field(default_factory=list)
    drafted: dict[Progress, tuple[int, ...]] = field(default_factory=dict)  # whose work goes on with these guesses
    drawing: list[Progress] = field(default_factory=list)  # who samples in these
    first: list[Progress] = field(default_factory=list)  # of these, who draw for the first time
    admitted: list[Admitted] = field(default_factory=list)
    fresh: list[BlockKey] = field(default_factory=list)  # named in this step: true only if it succeeds
    tokens: int = 0
    preempted: bool = False
    favoured: Progress | None = None  # waits, and others yielded so that it can start
    steps: int = 1  # how often the beat may be repeated
    left: list[Progress] = field(default_factory=list)  # in flight: whatever they draw is nobody's
    lane: int = 0
    serves: frozenset[State] = EVERYBODY  # those whom its lane serves
    beside: tuple[Step, ...] = ()  # in flight in other lanes while this one is planned
    joined: list[RequestId] = field(default_factory=list)  # began to decode while this one was in flight
    leaving: list[Progress] = field(default_factory=list)  # ended in flight, and still hold the blocks it writes
    held: str = ""  # why the first that waits could not start, as `events.Planned` says it

    @property
    def empty(self) -> bool:
        return not self.others and self.beat is None

    def served(self, progress: Progress) -> bool:
        """Whether a running request has had its turn, in this step or in one beside it. After the beat all who decode
        have, but those it left out."""
        if progress.served_step == self.number:
            return True
        if self.beat is not None and progress.pace is not None and progress.id not in self.beat.paused:
            return progress.id not in self.joined
        return bool(self.beside) and progress.running and any(step.served(progress) for step in self.beside)

    def draws(self, progress: Progress) -> bool:
        return progress in self.members or progress in self.drawing


class Flights:
    """By number. `policy` None means one lane."""

    def __init__(self, policy: SharePolicy | None) -> None:
        self._policy = policy
        self._lanes: tuple[Lane, ...] = SERIAL if policy is None else (Lane(), Lane())
        self._loads: list[Load | None] = [None for _ in self._lanes]  # of the steps in flight
        self.steps: dict[int, Step] = {}

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def serves(self, lane: int) -> frozenset[State]:
        return EVERYBODY if self._policy is None else _SERVED[lane]

    def of(self, lane: int) -> Step | None:
        return next((step for step in self.steps.values() if step.lane == lane), None)

    def beside(self, lane: int) -> tuple[Step, ...]:
        """In flight in other lanes."""
        return tuple(step for step in self.steps.values() if step.lane != lane)

    def begin(self, step: Step, used_blocks: int, total_blocks: int) -> tuple[Lane, ...]:
        """It is in flight from now on. Returns the shares that hold for it."""
        step.beside = ()
        self.steps[step.number] = step
        if self._policy is not None:
            self._loads[step.lane] = load(step)
            now = LanesView(step.now, step.lane, tuple(self._loads), self._shares, used_blocks, total_blocks)
            self._lanes = tuple(Lane(share) for share in self._policy(now))
        return self._lanes

    def end(self, step: Step) -> None:
        del self.steps[step.number]
        self._loads[step.lane] = None

    def holder(self, progress: Progress) -> Step | None:
        """The step that computes a request, if others may begin before it ends."""
        if self._policy is None or not progress.running:
            return None
        return next((step for step in self.steps.values() if step.served(progress)), None)

    @property
    def leaving(self) -> list[Progress]:
        """Who has ended, and holds blocks until its step has."""
        return [progress for step in self.steps.values() for progress in step.leaving]

    @property
    def _shares(self) -> Shares:
        return self._lanes[CATCH_UP].share, self._lanes[BEAT].share


def load(step: Step) -> Load:
    """What a step computes, as sums."""
    decodes = len(step.beat.rows) if step.beat else 0
    decode_context = step.beat.context_tokens + decodes if step.beat else 0
    others = [work for work in step.others if work.tokens > 1]
    alone = [work for work in step.others if work.tokens == 1]
    return Load(
        rows=decodes + len(step.others),
        tokens=decodes + sum(work.tokens for work in step.others),
        sampled=decodes + sum(work.sample for work in step.others),
        decodes=decodes + len(alone),
        pairs=sum(work.tokens * work.start + work.tokens * (work.tokens + 1) // 2 for work in others),
        prefill_context=sum(work.start + work.tokens for work in others),
        decode_context=decode_context + sum(work.start + 1 for work in alone),
    )
