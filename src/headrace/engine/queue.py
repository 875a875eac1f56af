"""Who stands where: the lines of waiting and running requests in the order of the ordering, their deadlines, and the
bounds of the queue, which says no when it is full and how long to stay away. Decides nothing about who starts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import overload

from headrace.core.types import Overloaded, RequestId
from headrace.engine.beats import Beats, by_order
from headrace.engine.policies.ordering import is_filler
from headrace.engine.progress import LEGAL, Progress, State

_MOST_GONE = 64  # kept in a line, whatever its length
_MEASURED = 64  # admissions that the drain rate looks back on
_SHORTEST_S, _LONGEST_S = 1.0, 600.0  # what a client may be told to wait


class Line:
    """Requests sorted by `order`, which is unique and must not change while they stand in line. The first may leave and
    a new last one join in O(1), and a snapshot costs nothing until somebody else moves.

        [ gone | gone | first | ... | last ]
                      '---- snapshot -----'     stays what it is, for what is gone is not taken out at once
    """

    __slots__ = ("_all", "_first", "_shown")

    def __init__(self) -> None:
        self._all: list[Progress] = []
        self._first = 0
        self._shown = False  # in a snapshot that somebody may hold

    def __len__(self) -> int:
        return len(self._all) - self._first

    @property
    def members(self) -> list[Progress]:
        return self._all[self._first :]

    @property
    def first(self) -> Progress:
        return self._all[self._first]

    def snapshot(self) -> Sequence[Progress]:
        """Who stands here now, in order."""
        if self._first == len(self._all):
            return ()
        self._shown = True
        return _Snapshot(self._all, range(self._first, len(self._all)))

    def add(self, progress: Progress) -> None:
        if self._all and progress.order < self._all[-1].order:
            self._detach()
            insort(self._all, progress, key=by_order)
        else:
            self._all.append(progress)

    def remove(self, progress: Progress) -> None:
        if self._all[self._first] is progress:
            self._first += 1
            if 2 * self._first > len(self._all) and self._first > _MOST_GONE:
                self._detach()
            return
        self._detach()
        at = bisect_left(self._all, progress.order, key=by_order)
        assert self._all[at] is progress, "a request is not where its order says"
        del self._all[at]

    def sort(self) -> None:
        """The orders of the members have changed."""
        self._detach()
        self._all.sort(key=by_order)

    def check(self) -> None:
        orders = list(map(by_order, self.members))
        assert orders == sorted(set(orders)), "a line is out of order"

    def _detach(self) -> None:
        """From those who are gone, and from snapshots."""
        if self._first or self._shown:
            self._all, self._first, self._shown = self._all[self._first :], 0, False


class _Snapshot(Sequence[Progress]):
    """A stretch of a list of which nobody changes that stretch."""

    __slots__ = ("_places", "_some")

    def __init__(self, some: list[Progress], places: range) -> None:
        self._some = some
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Progress]:
        return map(self._some.__getitem__, self._places)

    @overload
    def __getitem__(self, at: int) -> Progress: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Progress]: ...
    def __getitem__(self, at: int | slice) -> Progress | Sequence[Progress]:
        places = self._places[at]
        return self._some[places] if isinstance(places, int) else [self._some[place] for place in places]


class Lines:
    """Every live request, in the line of its state. The only place where a state changes, with the sums over states."""

    def __init__(self, block_tokens: int) -> None:
        self.live: dict[RequestId, Progress] = {}
        self.waiting, self.prefilling, self.decoding = Line(), Line(), Beats(block_tokens)
        self._of: dict[State, Line | Beats] = {State.WAITING: self.waiting, State.PREFILLING: self.prefilling}
        self._of[State.DECODING] = self.decoding
        self.waiting_tokens = 0  # prompt tokens of those who wait
        self.fillers = 0  # of the live, who are of the lowest priority level
        self.reserved_blocks = 0  # what the running would hold at their longest
        self.released: list[RequestId] = []  # left the running since the executor last heard of it

    def enter(self, progress: Progress) -> None:
        self.live[progress.id] = progress
        self.fillers += is_filler(progress)
        self._of[progress.state].add(progress)
        self.waiting_tokens += progress.prompt_tokens

    def move(self, progress: Progress, state: State) -> None:
        assert state in LEGAL[progress.state], f"a request cannot go from {progress.state.value} to {state.value}"
        was_waiting = progress.state is State.WAITING
        self._of[progress.state].remove(progress)
        progress.state = state
        if state is State.FINISHED:
            del self.live[progress.id]
            self.fillers -= is_filler(progress)
        else:
            self._of[state].add(progress)
        if was_waiting:
            self.waiting_tokens -= progress.prompt_tokens
            self.reserved_blocks += progress.longest_blocks * progress.running
        elif not progress.running:
            self.waiting_tokens += progress.prompt_tokens * (state is State.WAITING)
            self.reserved_blocks -= progress.longest_blocks
            self.released.append(progress.id)

    @property
    def running_count(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def running(self) -> list[Progress]:
        """In order. Two sorted lists: sorting merges them."""
        return sorted(self.decoding.members + self.prefilling.members, key=by_order)

    def reorder(self, key: Callable[[Progress], float]) -> None:
        for progress in self.live.values():
            progress.order = (key(progress), progress.arrival_number)
        for line in self._of.values():
            line.sort()

    def check(self) -> None:
        for state, line in self._of.items():
            line.check()
            assert all(progress.state is state for progress in line.members), f"somebody is in the {state.value} line"
        in_line = sorted(progress.id for line in self._of.values() for progress in line.members)
        assert in_line == sorted(self.live), "a request is in no line, in two, or in one it left"
        assert self.waiting_tokens == sum(progress.prompt_tokens for progress in self.waiting.members)
        assert self.reserved_blocks == sum(progress.longest_blocks for progress in self.running())
        assert self.fillers == sum(map(is_filler, self.live.values()))


class Deadlines:
    """A heap of live requests by deadline. The finished leave it late, but never outnumber the live for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Progress]] = []

    def add(self, progress: Progress) -> None:
        if progress.request.deadline_s is not None:
            heappush(self._heap, (progress.request.deadline_s, progress.arrival_number, progress))

    def next(self, live: int) -> Progress | None:
        """The live request whose deadline comes first."""
        if not self._heap:
            return None
        if len(self._heap) > 2 * live + 16:
            self._heap = [entry for entry in self._heap if entry[2].state is not State.FINISHED]
            heapify(self._heap)
        while self._heap and self._heap[0][2].state is State.FINISHED:
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None


class Bounds:
    """How many requests and prompt tokens may wait, and how fast they leave while somebody waits."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._left: deque[tuple[float, int]] = deque(maxlen=_MEASURED)  # (when, prompt tokens) of those who left
        self._left_s = 0.0  # when the last one did
        self._idle_s = 0.0  # time during which nobody waited: it says nothing about how fast a queue drains

    def left(self, prompt_tokens: int, now: float) -> None:
        """A waiting request was admitted."""
        self._left.append((now - self._idle_s, prompt_tokens))
        self._left_s = now

    def check_room(self, prompt_tokens: int, waiting: int, waiting_tokens: int, now: float) -> None:
        """Raises Overloaded if one more would be too many. An empty queue takes anybody."""
        if not waiting:
            self._idle_s += now - self._left_s
            self._left_s = now
        requests = waiting + 1 - self._max_requests
        tokens = waiting_tokens + prompt_tokens - self._max_tokens
        if waiting and (requests > 0 or tokens > 0):
            retry_s = self.drain_s(max(requests, 0), max(tokens, 0), now)
            waits = f"{waiting} requests with {waiting_tokens} prompt tokens are waiting"
            raise Overloaded(f"{waits}; try again in {math.ceil(retry_s)} s", retry_s)

    def drain_s(self, requests: int, tokens: int, now: float) -> float:
        """Seconds until so much has left, at the rate of the last who did."""
        if not self._left:
            return _SHORTEST_S
        elapsed_s = max(now - self._idle_s - self._left[0][0], 1e-3)
        left_tokens = sum(tokens for _, tokens in self._left)
        wait_s = elapsed_s * max(requests / len(self._left), tokens / max(left_tokens, 1))
        return min(max(wait_s, _SHORTEST_S), _LONGEST_S)
