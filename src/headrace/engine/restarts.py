"""How often an executor that was lost is started again, and after which delay. Pure; owns when that was."""

from __future__ import annotations

from collections import deque

MOST = 5  # within
WINDOW_S = 600.0
_FIRST_S, _LONGEST_S = 0.5, 8.0  # delays: none before the first, then these, doubling


class Restarts:
    """Counts every attempt, whether it came up or not."""

    def __init__(self, most: int = MOST, window_s: float = WINDOW_S) -> None:
        self.count = 0  # ever
        self._most = most
        self._window_s = window_s
        self._times: deque[float] = deque()

    def next(self, now: float) -> float | None:
        """Seconds to wait before the next attempt, which counts from here on; None: there have been enough."""
        while self._times and now - self._times[0] > self._window_s:
            self._times.popleft()
        before = len(self._times)
        if before >= self._most:
            return None
        self._times.append(now)
        self.count += 1
        return min(_FIRST_S * 2 ** (before - 1), _LONGEST_S) if before else 0.0

    def explained(self) -> None:
        """The reason was found, and is gone: what it has cost is not held against the executor."""
        self._times.clear()
