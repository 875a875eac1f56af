"""Times between the tokens of one request, from events that cost nothing per request that merely goes on.

All who decode draw at the ends of beats, so their gaps are those between beats, whoever they are: one number for all,
and the longest gap of a request is the greatest of a stretch of beats. Only who just joined, was left out of a beat or
was preempted has a last token of its own, and is remembered apart until the next beat.
"""

from __future__ import annotations

from bisect import bisect_left

from headrace.core.events import Decoded, Drew
from headrace.core.types import RequestId
from headrace.sim.sketch import Sketch

_MANY = 4096  # remembered beats beyond which those before the oldest request are dropped


class _Last:
    """The last token of one request."""

    __slots__ = ("at_s", "longest_s", "since")

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s  # while it is apart
        self.longest_s = 0.0  # of its gaps before `since`
        self.since: int | None = None  # the first beat whose gap is its own; None while it is apart


class Gaps:
    """Folds `Drew` and `Decoded` of one replica into `all`, and tells the longest gap of each request."""

    def __init__(self) -> None:
        self.all = Sketch()
        self._last: dict[RequestId, _Last] = {}
        self._joining: dict[RequestId, _Last] = {}  # apart, and in the next beat
        self._beat_s = 0.0  # the end of the last beat
        self._number = 0  # of beats, or of stretches of equal ones
        self._numbers: list[int] = []  # of beats with a longer gap than all after them
        self._gaps_s: list[float] = []  # theirs: falling

    def drew(self, event: Drew) -> None:
        for request_id, tokens in zip(event.request_ids, event.tokens, strict=True):
            last = self._last.get(request_id)
            if last is None:
                last = self._last[request_id] = _Last(event.at_s)
            else:
                self._part(last)
                self._gap(last, event.at_s, tokens)
            self._joining[request_id] = last

    def decoded(self, event: Decoded) -> None:
        run, joining = event.run, self._joining
        later = run.after(1) if run.steps > 1 else None
        first_s = event.at_s if later is None else event.at_s - later.total_s  # the end of the first repetition
        left_out = self._leave_out(event.paused) if event.paused else {}
        for last in joining.values():
            self._gap(last, first_s, 1)
            last.since = self._number + 1
        if event.requests > len(joining):
            self._push(first_s - self._beat_s)
            self.all.add(first_s - self._beat_s, event.requests - len(joining))
        self._number += 1
        if later is not None and event.requests:
            self._push(max(later.first_s, run.after(run.steps - 1).first_s))
            self.all.add_run(later, event.requests)
            self._number += 1
        self._joining, self._beat_s = left_out, event.at_s

    def preempted(self, request_id: RequestId) -> None:
        """It has no beat until it draws again."""
        last = self._last.get(request_id)
        if last is not None:
            self._part(last)
            self._joining.pop(request_id, None)

    def finished(self, request_id: RequestId) -> float | None:
        """The longest gap of a request that is no more; None if it drew nothing."""
        last = self._last.pop(request_id, None)
        if last is None:
            return None
        self._joining.pop(request_id, None)
        self._part(last)
        return last.longest_s

    def _leave_out(self, paused: tuple[RequestId, ...]) -> dict[RequestId, _Last]:
        """Those who decode but not in this beat; who drew alone stays what it is."""
        left_out = {}
        for request_id in paused:
            last = self._last.get(request_id)
            if last is not None:
                self._part(last)
                self._joining.pop(request_id, None)
                left_out[request_id] = last
        return left_out

    def _part(self, last: _Last) -> None:
        """From the common beat to a last token of its own."""
        if last.since is not None:
            at = bisect_left(self._numbers, last.since)
            if at < len(self._gaps_s):
                last.longest_s = max(last.longest_s, self._gaps_s[at])
            last.at_s, last.since = self._beat_s, None

    def _gap(self, last: _Last, at_s: float, tokens: int) -> None:
        gap_s = (at_s - last.at_s) / tokens
        self.all.add(gap_s, tokens)
        last.longest_s = max(last.longest_s, gap_s)
        last.at_s = at_s

    def _push(self, gap_s: float) -> None:
        while self._gaps_s and self._gaps_s[-1] <= gap_s:
            del self._gaps_s[-1], self._numbers[-1]
        self._gaps_s.append(gap_s)
        self._numbers.append(self._number)
        if len(self._numbers) > _MANY + 2 * len(self._last):
            oldest = min((last.since for last in self._last.values() if last.since is not None), default=self._number)
            stale = bisect_left(self._numbers, oldest)
            del self._numbers[:stale], self._gaps_s[:stale]
