"""The steps in flight, at most one in each lane. With one lane they follow each other; with two, lane CATCH_UP serves
those who wait or catch up and lane BEAT everybody who decodes, so no request is ever wanted by both. Owns which steps
are in flight and what waits for their ends; a policy of `policies.lanes` sets the shares.

    CATCH_UP  |==== r computes its prompt ====|         nothing of r moves until its step ends: it is nobody's victim,
    BEAT      |- beat -|- beat -|-- beat --|-- r too    and if it is aborted its blocks are free only then
"""

from __future__ import annotations

from headrace.core.step import SERIAL, Lane
from headrace.engine.planner import EVERYBODY, Step
from headrace.engine.policies.lanes import LanesView, Load, SharePolicy, Shares
from headrace.engine.progress import Progress, State

CATCH_UP, BEAT = 0, 1
_SERVED = (frozenset({State.WAITING, State.PREFILLING}), frozenset({State.DECODING}))


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
