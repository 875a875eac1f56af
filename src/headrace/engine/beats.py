"""The line of those who decode, and the beat they share. In every beat each of them computes one token, so what changes
from step to step is one number: a request's computed tokens are its offset plus the beats so far. Owns the beat, the
rows that plans show of it, who begins a block in which beat, and who reaches the end of its length in which.

    computed tokens
       ^      a  .'        offset: where its line meets beat 0
       |      .'  b .'     begins a block where its line crosses a multiple of block_tokens
       |   .'    .'
       '--------------> beats
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from operator import attrgetter

from headrace.core.step import Decode
from headrace.engine.progress import Pace, Progress

by_order = attrgetter("order")


class Beats:
    """A line like any other, sorted by `order`. Joining and leaving cost O(log n), a beat what it begins."""

    def __init__(self, block_tokens: int) -> None:
        self.members: list[Progress] = []
        self.pace = Pace()
        self._rows: list[Decode] = []  # of the members
        self._offsets = 0  # their sum
        self._highest: int | None = None  # of the offsets; None: look
        self._begins: list[set[Progress]] = [set() for _ in range(block_tokens)]  # by offset modulo block
        self._ends: list[tuple[int, int, Progress]] = []  # (beats so far when its length is reached, .., who)

    def __len__(self) -> int:
        return len(self.members)

    def add(self, progress: Progress) -> None:
        at = bisect_left(self.members, progress.order, key=by_order)
        offset = progress.join(self.pace)
        self.members.insert(at, progress)
        self._rows.insert(at, Decode(progress.id, offset))
        self._offsets += offset
        if self._highest is not None and offset > self._highest:
            self._highest = offset
        self._begins[offset % len(self._begins)].add(progress)
        heappush(self._ends, (progress.last_tokens - offset, progress.arrival_number, progress))

    def remove(self, progress: Progress) -> None:
        at = bisect_left(self.members, progress.order, key=by_order)
        assert self.members[at] is progress, "a request is not where its order says"
        del self.members[at]
        offset = self._rows.pop(at).offset
        self._offsets -= offset
        if offset == self._highest:
            self._highest = None
        self._begins[offset % len(self._begins)].discard(progress)
        progress.leave()

    def skip(self, progress: Progress, tokens: int) -> None:
        """It is so many tokens further than the beats brought it."""
        self.remove(progress)
        progress.computed_tokens += tokens
        self.add(progress)

    def sort(self) -> None:
        """The orders of the members have changed."""
        rows = dict(zip(self.members, self._rows, strict=True))
        self.members.sort(key=by_order)
        self._rows = [rows[progress] for progress in self.members]

    # -- the beat ------------------------------------------------------------------------------------------------------

    @property
    def context_tokens(self) -> int:
        """The sum of what the members have computed."""
        return self._offsets + self.pace.number * len(self.members)

    def beginners(self) -> list[Progress]:
        """Who needs a block for the next beat, in order."""
        return sorted(self._begins[-self.pace.number % len(self._begins)], key=by_order)

    def beat(self, apart: Iterable[Progress] = ()) -> tuple[tuple[Decode, ...], int]:
        """Everybody but those `apart` goes on by one token. Returns the rows and the sum of their positions."""
        for progress in apart:
            self.remove(progress)
        rows, number = tuple(self._rows), self.pace.number
        context_tokens = self._offsets + number * len(rows)
        self.pace.number += 1
        for progress in apart:
            self.add(progress)
        return rows, context_tokens

    def longest(self) -> int:
        """The highest position in the next beat. Looks through the rows when the one that was longest has left."""
        if self._highest is None:
            self._highest = max((row.offset for row in self._rows), default=-self.pace.number)
        return self._highest + self.pace.number if self._rows else 0

    def again(self, beats: int) -> Iterator[list[Progress]]:
        """The same beat so often. Yields who needs a block for each, in order, before it goes by."""
        for _ in range(beats):
            yield self.beginners()
            self.pace.number += 1

    def until_end(self) -> int | None:
        """Beats after which the first of them reaches its length; None if nobody is here."""
        ends = self._ends
        if len(ends) > 2 * len(self.members) + 16:
            self._ends = ends = [end for end in ends if self._counts(end)]
            heapify(ends)
        while ends and not self._counts(ends[0]):
            heappop(ends)
        return ends[0][0] - self.pace.number if ends else None

    def ended(self) -> list[Progress]:
        """Who has reached its length."""
        ended = []
        while self.until_end() == 0:
            ended.append(heappop(self._ends)[2])
        return list(dict.fromkeys(ended))  # an end may have been foreseen twice

    def affordable(self, blocks: int, most: int) -> int:
        """How many beats, at most `most`, begin no more than so many blocks. In `block_tokens` beats everybody begins
        one."""
        size, number = len(self._begins), self.pace.number
        if (most // size + 1) * len(self.members) <= blocks:
            return most
        cycles = min(blocks // max(len(self.members), 1), most // size)
        beats, left = cycles * size, blocks - cycles * len(self.members)
        while beats < most and (left := left - len(self._begins[-(number + beats) % size])) >= 0:
            beats += 1
        return beats

    def check(self) -> None:
        orders, size = list(map(by_order, self.members)), len(self._begins)
        assert orders == sorted(set(orders)), "a line is out of order"
        assert self._rows == [Decode(one.id, one.offset) for one in self.members], "a row does not show its request"
        assert all(one.pace is self.pace for one in self.members), "a request decodes at another pace"
        assert self._offsets == sum(one.offset for one in self.members)
        assert self._highest is None or self._highest == max(one.offset for one in self.members)
        for phase, begins in enumerate(self._begins):
            assert begins == {one for one in self.members if one.offset % size == phase}, "a block begins unseen"
        ends = [end for end in self._ends if self._counts(end)]
        assert {progress for _, _, progress in ends} == set(self.members), "an end is missing"
        assert all(beats >= self.pace.number for beats, _, _ in ends), "a request goes on beyond its length"

    def _counts(self, end: tuple[int, int, Progress]) -> bool:
        """Whether the request still is where it was when this end was foreseen."""
        beats, _, progress = end
        return progress.pace is self.pace and progress.last_tokens - progress.offset == beats
