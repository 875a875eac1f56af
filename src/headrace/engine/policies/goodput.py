"""How many drafts are verified: as many as raise goodput, the tokens a step is expected to draw per second that it
takes (SmartSpec, arXiv:2406.14066). Two estimates decide, both made of what this replica has measured: the seconds of a
step and the chance of a draft, `policies.estimates`. Under load a step's time grows with every token, so nothing is
worth verifying; the same rule says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headrace.core.config import EngineSettings
from headrace.core.events import Event, Finished, StepDone, Verified
from headrace.core.types import HeadraceError
from headrace.engine.policies.estimates import Chances, StepTime
from headrace.engine.policies.joints import Draft, Drafter, DraftView, RequestView

MARGIN = 1.1  # how much more a draft must bring than it costs (SmartSpec's factor on not drafting)
MOST_DRAFTS = 256  # of one request in one step, whatever the settings say
_ROUNDS = 4  # in which the rate that drafts must beat is raised to the rate that they yield

Chosen = Sequence[tuple[RequestView, tuple[int, ...]]]


def no_drafts(view: DraftView, drafter: Drafter) -> Chosen:
    """Nothing is worth it."""
    return ()


def most_drafts(settings: EngineSettings) -> int:
    """Raises HeadraceError."""
    if not 1 <= settings.draft_tokens <= MOST_DRAFTS:
        raise HeadraceError(f"draft_tokens is {settings.draft_tokens}; it must be between 1 and {MOST_DRAFTS}")
    return settings.draft_tokens


class Always:
    """Whatever the drafter guesses, as far as the token budget goes: for comparisons."""

    def __init__(self, settings: EngineSettings) -> None:
        self._most = most_drafts(settings)

    def __call__(self, view: DraftView, drafter: Drafter) -> Chosen:
        asked = ((request, drafter(request, self._most)) for request in view.decoding) if view.token_room > 0 else ()
        return [(request, draft.token_ids) for request, draft in asked if draft is not None]


class _Offer(NamedTuple):
    """What one request could verify: a chance for each draft that it will be drawn, falling, and the price of each."""

    request: RequestView
    draft: Draft
    chances: list[float]
    seconds: float

    def worth(self, rate: float) -> int:
        """How many of them bring more than so many tokens per second."""
        bar = rate * self.seconds
        return next((at for at, chance in enumerate(self.chances) if chance < bar), len(self.chances))


class Goodput:
    """With b requests that decode, and p_j the chance that the j-th draft of a request is drawn, the goodput

        (b + sum p_j) / (t + sum s)      t: seconds of the step without drafts, s: seconds that a draft adds

    is largest for exactly those drafts whose own p_j / s is above it (a fraction is raised by parts above it), which
    is found by raising the bar from b / t (Dinkelbach). The p_j of one request fall, so it is a length for each."""

    def __init__(self, settings: EngineSettings) -> None:
        self._most = most_drafts(settings)
        self._time = StepTime()
        self._chances = Chances()
        self._expected: tuple[int, float, bool] | None = None  # (tokens, context, drafts) of the step that was decided

    def observe(self, event: Event) -> None:
        match event:
            case StepDone():
                if self._expected is not None and self._expected[0] == event.tokens:  # or prompts are in it
                    self._time.learn(*self._expected, event.run.first_s)
                self._expected = None
                self._chances.fade()
            case Verified():
                for name, drafted, accepted in zip(event.request_ids, event.drafted, event.accepted, strict=True):
                    self._chances.learn(name, drafted, accepted)
            case Finished():
                self._chances.forget(event.request_id)

    def __call__(self, view: DraftView, drafter: Drafter) -> Chosen:
        rows, context = len(view.decoding), view.context_tokens
        self._expected = (rows, context, False)
        plain_s = self._time.seconds(rows, context, False)
        room = view.token_room // 2 if view.behind else view.token_room
        if not plain_s or room < 1 or self._chances.best * plain_s < MARGIN * rows * self._time.seconds_per_token(0):
            return ()
        offers = self._offers(view, drafter)
        lengths = self._lengths(offers, rows, plain_s, room)
        chosen = [(offer, length) for offer, length in zip(offers, lengths, strict=True) if length]
        if not chosen:
            return ()
        context += sum(length * offer.request.computed_tokens for offer, length in chosen)
        self._expected = (rows + sum(lengths), context, True)
        for offer, _ in chosen:
            self._chances.expect(offer.request.request.id, offer.draft.evidence)
        return [(offer.request, offer.draft.token_ids[:length]) for offer, length in chosen]

    def _offers(self, view: DraftView, drafter: Drafter) -> list[_Offer]:
        offers = []
        for request in view.decoding:
            left = request.limit_tokens - request.computed_tokens - 2  # the last token is drawn, and never computed
            draft = drafter(request, min(self._most, left)) if left > 0 else None
            if draft is not None:
                chances = self._chances.of(request.request.id, draft.evidence, len(draft.token_ids))
                seconds = self._time.seconds_per_token(request.computed_tokens)
                offers.append(_Offer(request, draft, chances, seconds))
        return offers

    def _lengths(self, offers: list[_Offer], rows: int, plain_s: float, room: int) -> list[int]:
        """How many drafts of each are worth verifying."""
        values = sorted((chance / offer.seconds for offer in offers for chance in offer.chances), reverse=True)
        bar = max(MARGIN * rows / plain_s, values[room] if len(values) > room else 0.0)
        lengths, rate = [0] * len(offers), 0.0
        for _ in range(_ROUNDS):
            lengths = [offer.worth(bar) for offer in offers]
            drawn, seconds = float(rows), plain_s + self._time.drafting_s
            for offer, length in zip(offers, lengths, strict=True):
                drawn += sum(offer.chances[:length])
                seconds += length * offer.seconds
            rate = drawn / seconds
            if bar >= MARGIN * rate:
                break
            bar = MARGIN * rate
        return lengths if rate > rows / plain_s else [0] * len(offers)
