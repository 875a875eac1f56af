"""Priorities that change while requests run, as the traces by which FastSwitch (arXiv:2411.18424) makes its servers
switch: every 1 / f steps everybody's priority is drawn anew, at random or with a memory. Owns the last draw of each
live request, and counts the steps. Nothing is random: a draw is a hash of the request's name and of the update.
"""

from __future__ import annotations

from hashlib import blake2b

from headrace.core.config import EngineSettings
from headrace.core.events import Event, Finished, StepDone
from headrace.core.types import HeadraceError, RequestId
from headrace.engine.policies.joints import RequestView
from headrace.engine.policies.ordering import AGEING_S

LEVELS = 10  # of priority, all alike likely
STAY = 0.9  # how likely a priority with a memory stays what it is at an update


class PriorityTrace:
    """Larger priority first, then arrival; at an update a priority stays with probability `stay`, and is drawn from all
    LEVELS otherwise. `priority_updates` is f, updates a step (the paper: 0.04 for an 8B model, 0.02 for 32B).

    The bound: as in `ordering.priority`, a level makes up for AGEING_S seconds of waiting, so nobody who arrives more
    than (LEVELS - 1) * AGEING_S later ever goes first.
    """

    def __init__(self, settings: EngineSettings, stay: float) -> None:
        if not 0 < settings.priority_updates <= 1:
            raise HeadraceError(
                f"priority_updates is {settings.priority_updates}; give more than 0 and at most 1 a step"
            )
        self._updates_per_step = settings.priority_updates
        self._stay = stay
        self._steps = 0
        self._drawn: dict[RequestId, tuple[int, int]] = {}  # (update, level) of live requests

    def observe(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._steps += event.run.steps
        elif isinstance(event, Finished):
            self._drawn.pop(event.request_id, None)

    def __call__(self, request: RequestView, now: float) -> float:
        name, update = request.request.id, int(self._steps * self._updates_per_step)
        drawn = self._drawn.get(name)
        if drawn is None or drawn[0] != update:
            drawn = self._drawn[name] = (update, self._level(name, drawn, update))
        return request.request.arrival_s - drawn[1] * AGEING_S

    def _level(self, name: RequestId, drawn: tuple[int, int] | None, update: int) -> int:
        """Going back from `update` to the last one at which it was drawn anew."""
        while drawn is not None and update > drawn[0]:
            stays, level = _two_shares(name, update)
            if stays >= self._stay:
                return int(level * LEVELS)
            update -= 1
        return int(_two_shares(name, update)[1] * LEVELS) if drawn is None else drawn[1]


def random_priority(settings: EngineSettings) -> PriorityTrace:
    """Every update draws all priorities anew."""
    return PriorityTrace(settings, 0.0)


def markov_priority(settings: EngineSettings) -> PriorityTrace:
    """Who is in favour mostly stays so."""
    return PriorityTrace(settings, STAY)


def _two_shares(name: RequestId, update: int) -> tuple[float, float]:
    """Two numbers in [0, 1), always the same ones for the same arguments."""
    content = f"{update}/{name}".encode("utf-8", "surrogatepass")
    digest = blake2b(content, digest_size=16, person=b"priority").digest()
    return int.from_bytes(digest[:8], "little") / 2**64, int.from_bytes(digest[8:], "little") / 2**64
