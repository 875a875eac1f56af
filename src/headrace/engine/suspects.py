"""Who may be the reason that executors are lost: requests that were in the step under way each time and drew nothing
in between. Owns that suspicion and nothing of the requests.

    loss 1   a b c d together    bad luck: all go on as before
    loss 2   a b c d together    again, and nobody got further: from here on each computes alone until it draws a token
             a alone, b alone    they do: they are innocent
    loss 3   c alone             c is the reason. Who is alone at its second loss already is so then
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.engine.progress import Progress

_ALONE, _TOGETHER = 2, 4  # losses in a row after which a request is ended, if it was alone in the last, or in any case


class Suspects:
    """`isolates`: whether suspects can be computed alone; if not, the second loss decides."""

    def __init__(self, isolates: bool) -> None:
        self._isolates = isolates
        self._losses: dict[Progress, int] = {}  # in a row

    def __bool__(self) -> bool:
        return bool(self._losses)

    def lost(self, under_way: Sequence[Progress]) -> list[Progress]:
        """The executor was lost in a step of these. Returns who has to end. Those who were elsewhere are innocent."""
        self._losses = {progress: self._losses.get(progress, 0) + 1 for progress in under_way}
        most = _ALONE if len(under_way) == 1 or not self._isolates else _TOGETHER
        guilty = [progress for progress, losses in self._losses.items() if losses >= most]
        if guilty:
            self._losses.clear()
        return guilty

    def drew(self, some: Iterable[Progress]) -> None:
        for progress in some:
            self._losses.pop(progress, None)

    def left(self, progress: Progress) -> None:
        """It has ended."""
        self._losses.pop(progress, None)

    def alone(self) -> Progress | None:
        """Who has to compute alone now, if anybody."""
        if not self._isolates:
            return None
        return next((progress for progress, losses in self._losses.items() if losses >= _ALONE), None)

    def check(self, live: Iterable[Progress]) -> None:
        assert self._losses.keys() <= set(live), "somebody who has ended is suspected"
