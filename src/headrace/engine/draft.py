"""Carries drafts through a step: who decodes on by several tokens at once, in memory that nobody needs, and how far it
came. Decides nothing: what to draft, the policies say, and how much of it is right, the executor.

    computed_tokens            + drafted_tokens
    |---- known -------|t| d1  d2  d3 |             in flight: blocks for all of them, names for none
    |------------------------|                      d1 was drawn: computed goes on by one, the blocks of d2, d3 go back
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headrace.core.step import Sampled
from headrace.engine.memory import Memory
from headrace.engine.policies.joints import DraftView
from headrace.engine.policy import Policies
from headrace.engine.progress import Progress, State
from headrace.engine.queue import Lines


class Drafting:
    """What the planner and the scheduler do for requests that have drafts."""

    def __init__(self, policies: Policies, lines: Lines, memory: Memory) -> None:
        self._drafter = policies.drafter
        self._controller = policies.controller
        self._lines = lines
        self._memory = memory

    @property
    def on(self) -> bool:
        return self._drafter is not None

    def offers(self, view: DraftView) -> Iterator[tuple[Progress, tuple[int, ...]]]:
        """Who gets which drafts, each to be granted before the next is asked for. No more than a request may still
        draw, than `view.token_room`, and than there are free blocks beside those that the beat is about to take."""
        if self._drafter is None or not view.decoding:
            return
        owed, left = len(self._lines.decoding.beginners()), view.token_room
        memory, seen = self._memory, set[Progress]()
        for request, guesses in self._controller(view, self._drafter):
            progress = self._lines.live.get(request.request.id)
            if progress is None or progress.state is not State.DECODING or progress in seen:
                continue
            seen.add(progress)
            known, held = progress.computed_tokens + 1, len(progress.blocks)
            begins = memory.blocks_for(known) > held
            room = (held + max(memory.pool.free - owed + begins, 0)) * memory.block_tokens - known
            most = min(len(guesses), progress.last_tokens - known, room, left)
            if most > 0:
                owed -= begins
                left -= most
                yield progress, guesses[:most]

    def settle(self, drafted: Mapping[Progress, tuple[int, ...]], kept: Mapping[Progress, Sampled]) -> None:
        """The step is over, and of the drafts so many were accepted as there are tokens in `kept` beside the last."""
        for progress in drafted:
            if progress.state is not State.DECODING:
                continue
            sampled = kept.get(progress)
            if sampled is not None and len(sampled.token_ids) > 1:
                self._lines.decoding.skip(progress, len(sampled.token_ids) - 1)
            self._memory.trim(progress)
