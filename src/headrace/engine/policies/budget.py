"""How much a step may compute so that it takes no longer than the inter-token target: Sarathi-Serve's budget, by what
steps have taken lately instead of by what they took when the model was loaded. Owns the price; it follows from events
alone, so that the same durations replay to the same plans.

The budget counts in plain tokens. A token that reads context is worth more than one, 1 + context / even, where `even`
is the context whose reading takes as long as the token itself:

    seconds = base + token * (tokens + (contexts of the tokens) / even) <= target
                             '------------- worth -------------------'
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

from headrace.core.events import Event, StepDone
from headrace.core.step import Beat, Work
from headrace.engine.policies.estimates import StepTime

LEAST_TOKENS, MOST_LEAST_TOKENS = 16, 128  # of prompts in any step: in between, as many as cost what its base costs
DRIFT = 0.05  # of the price, in one step: a machine that others begin to use is another one
_AT_ONCE = 1 << 40  # tokens: more than any step has


class StepBudget:
    """Of one scheduler. `begin` a step, ask what fits, say what was `planned`, and let it `observe` how long that took.

    Steps in which everybody only decodes are not learnt from: nothing could be cut from them, they would draw the price
    towards themselves in the long while between two prompts, and a simulator may take thousands of them at once.

    The bound: however slow the device or long the context, every step computes LEAST_TOKENS of some prompt."""

    def __init__(self, target_s: float, base_s: float, token_s: float, most_tokens: int) -> None:
        self._target_s = target_s
        self._most = most_tokens
        self._time = StepTime((base_s, token_s), DRIFT)
        self._planned: tuple[int, float, float, bool] | None = None  # (step, tokens, their contexts, drafts)
        self._drafts = False  # in the last step that was learnt from
        self._share = 0.0  # of a token that each token of its context adds
        self._least = LEAST_TOKENS

    def begin(self, rows: int, context: int) -> int:
        """The worth of what the next step may compute, if so many rows decode after so much context altogether."""
        base_s, token_s, context_s, drafting_s = self._time.prices
        self._share = context_s / token_s
        self._least = min(MOST_LEAST_TOKENS, max(LEAST_TOKENS, int(base_s / token_s)))
        room_s = self._target_s - base_s - drafting_s * self._drafts
        fitting = min(self._most, int(min(room_s / token_s, _AT_ONCE)))
        return max(fitting, self.worth_of_decodes(rows, context) + self._least)

    def worth(self, start: int, tokens: int) -> int:
        """Of tokens from position `start` on: at least one each."""
        return tokens + ceil(self._share * (tokens * start + tokens * (tokens + 1) // 2))

    def worth_of_decodes(self, rows: int, context: int) -> int:
        return rows + ceil(self._share * (context + rows))

    def fitting(self, start: int, worth: int) -> int:
        """The most tokens from position `start` on that are worth no more, but the least that a step computes."""
        line = 1.0 + self._share * (start + 0.5)
        tokens = int(2 * worth / (line + sqrt(line * line + 2 * self._share * worth))) if worth > 0 else 0
        return max(tokens, min(worth, self._least))

    def planned(self, step: int, others: Sequence[Work], beat: Beat | None, layers: int) -> None:
        """What the step computes beside the beat. Work through some of the layers is that share of its tokens."""
        if not others:
            self._planned = None
            return
        rows = len(beat.rows) if beat else 0
        tokens, contexts = float(rows), float(rows + beat.context_tokens) if beat else 0.0
        for work in others:
            part = 1.0 if work.layers is None else (work.layers[1] - work.layers[0]) / layers
            tokens += part * work.tokens
            contexts += part * (work.tokens * work.start + work.tokens * (work.tokens + 1) / 2)
        self._planned = (step, tokens, contexts, any(work.drafts for work in others))

    def observe(self, event: Event) -> None:
        if isinstance(event, StepDone) and self._planned is not None and self._planned[0] == event.step:
            _, tokens, contexts, self._drafts = self._planned
            self._time.learn(tokens, contexts, self._drafts, event.run.first_s)
            self._planned = None
