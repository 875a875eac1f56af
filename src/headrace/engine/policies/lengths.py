"""How long answers will be, told from how long the last ones were. Owns the window of past lengths; see `future` and
`deadlines` for those who ask.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

from headrace.core.events import Event, Finished
from headrace.core.types import FinishReason

_OWN_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


class Lengths:
    """The output tokens of the last `window` requests that came to an end of their own."""

    def __init__(self, window: int) -> None:
        self._window = max(window, 1)
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def observe(self, event: Event) -> None:
        if type(event) is not Finished or event.reason not in _OWN_ENDS:
            return
        if len(self._recent) == self._window:
            oldest = self._recent.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._recent.append(event.usage.output_tokens)
        insort(self._sorted, event.usage.output_tokens)

    def quantile(self, share: float, drawn: int, most: int) -> float:
        """The output tokens that a request has come to with probability `share`, given that it comes to more than the
        `drawn` ones and at most to `most`: a quantile of the past lengths beyond `drawn` with `most` as the last,
        linear in between (Past-Future, LightLLM). So nothing is known at first but `most`."""
        past = self._sorted
        first = bisect_right(past, drawn)
        place = share * (len(past) - first)
        at = first + int(place)
        low = past[at] if at < len(past) else most
        high = past[at + 1] if at + 1 < len(past) else most
        return min(most, low + (high - low) * (place - int(place)))
