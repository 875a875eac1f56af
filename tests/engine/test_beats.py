"""The line of those who decode against a list that counts every request by itself."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from headrace.core.step import Decode
from headrace.core.types import Blank, Request
from headrace.engine.beats import Beats
from headrace.engine.progress import Progress, State

ANYTHING = settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=40)


def decoding(number: int, computed_tokens: int, last_tokens: int, order: float = 0.0) -> Progress:
    progress = Progress(Request(str(number), (Blank(1),), 0.0, 10**6), 10**6, number, 0.0)
    progress.computed_tokens, progress.last_tokens = computed_tokens, last_tokens
    progress.order, progress.state = (order, number), State.DECODING
    return progress


class BeatsMachine(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 5))
    def start(self, size: int) -> None:
        self.size = size
        self.beats = Beats(size)
        self.here: dict[Progress, int] = {}  # computed tokens, counted one by one
        self.numbers = itertools.count()

    @rule(computed=st.integers(1, 30), more=st.integers(1, 12), order=st.integers(0, 3))
    def join(self, computed: int, more: int, order: int) -> None:
        progress = decoding(next(self.numbers), computed, computed + more, float(order))
        self.beats.add(progress)
        self.here[progress] = computed

    @rule(data=st.data())
    @precondition(lambda self: self.here)
    def leave(self, data: st.DataObject) -> None:
        progress = data.draw(st.sampled_from(list(self.here)))
        self.beats.remove(progress)
        assert progress.computed_tokens == self.here.pop(progress)
        assert progress.output_tokens == progress.computed_tokens + 1 - progress.prompt_tokens

    @rule(data=st.data())
    @precondition(lambda self: self.here)
    def beat(self, data: st.DataObject) -> None:
        """Some stay behind, the others go on; who reaches the end leaves."""
        apart = data.draw(st.lists(st.sampled_from(list(self.here)), unique=True, max_size=len(self.here) - 1))
        number, beginners = self.beats.pace.number, self.beats.beginners()
        assert beginners == [one for one in self.beats.members if self.here[one] % self.size == 0]
        assert self.beats.longest() == max(self.here.values())
        rows, context_tokens = self.beats.beat(apart)
        served = [one for one in self.beats.members if one not in apart]
        assert rows == tuple(Decode(one.id, self.here[one] - number) for one in served)
        assert context_tokens == sum(self.here[one] for one in served)
        for one in served:
            self.here[one] += 1
        self.end()

    @rule(times=st.integers(1, 20))
    @precondition(lambda self: self.here)
    def many_beats(self, times: int) -> None:
        """As far as nobody ends."""
        until_end = min(one.last_tokens - computed for one, computed in self.here.items())
        assert self.beats.until_end() == until_end
        gone = 0
        for begin in self.beats.again(min(times, until_end)):
            assert begin == [one for one in self.beats.members if (self.here[one] + gone) % self.size == 0]
            gone += 1
        assert gone == min(times, until_end)
        self.here = {one: computed + gone for one, computed in self.here.items()}
        self.end()

    @rule(blocks=st.integers(0, 60), most=st.integers(0, 40))
    @precondition(lambda self: self.here)
    def count_blocks(self, blocks: int, most: int) -> None:
        beats, left = 0, blocks
        while beats < most:
            left -= sum((computed + beats) % self.size == 0 for computed in self.here.values())
            if left < 0:
                break
            beats += 1
        assert self.beats.affordable(blocks, most) == beats

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        for one in self.here:
            one.order = (data.draw(st.floats(0, 1)), one.arrival_number)
        self.beats.sort()

    def end(self) -> None:
        ended = [one for one, computed in self.here.items() if computed == one.last_tokens]
        assert sorted(self.beats.ended(), key=id) == sorted(ended, key=id)
        for one in ended:
            self.beats.remove(one)
            del self.here[one]

    def teardown(self) -> None:
        self.beats.check()
        assert {one: one.computed_tokens for one in self.beats.members} == self.here


def test_any_sequence_of_beats() -> None:
    run_state_machine_as_test(BeatsMachine, settings=ANYTHING)


def test_what_everybody_draws_is_known_of_who_leaves() -> None:
    beats, progress = Beats(4), decoding(0, 1, 100)
    beats.add(progress)
    beats.pace.token = 7
    for _ in range(5):
        beats.beat()
    beats.remove(progress)
    values: Any = progress.output_ids
    assert values == [7] * 6
    assert progress.computed_tokens == 6
