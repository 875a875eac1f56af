"""What a replica has learnt of itself, for those who decide about drafts and budgets: how long its steps take, and how
often guesses are right. Owns these estimates; they follow from events alone, so that the same events replay to the same
plans.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from math import sqrt
from operator import mul

from headrace.core.types import RequestId

_BASE_TOKENS = 16  # before anything is known: a step takes as long as so many tokens, and each token of it
_CONTEXT_TOKENS = 1000  # and so much context costs at most about as much as a token
_NOISE = 0.1  # of a duration
_DRIFT = 0.02  # of what was believed at first, in one step
_DOUBT = 0.5  # standard deviations that a token is taken to cost more than is known
_LEAST = 1e-3  # of what was believed at first: a token is never free
_MOST_SIGMAS = 3.0  # a step that took longer was held up by something else
_STRANGE_SIGMAS = 2.0  # a step that differs by more is strange,
_STRANGE_STEPS = 3  # and so many in a row are a device that has changed


class StepTime:
    """seconds = base + token * tokens + context * (sum of contexts over tokens) + drafting, the last one only if there
    are drafts, whose rows may run other kernels. A Kalman filter whose coefficients drift: steps like those of now
    decide, and nothing is forgotten that they do not speak of. One strange step is an outlier; several in a row, all
    too slow or all too fast, mean that the device has changed, and everything is as doubtful as it was at first.

    `price` is (base, token), where they were measured before; what context costs is then believed to be the most."""

    def __init__(self, price: tuple[float, float] | None = None, drift: float = _DRIFT) -> None:
        self._mean = [0.0] * 4
        self._sigma = [0.0] * 4  # of each coefficient at first, and the most
        self._covariance = [[0.0] * 4 for _ in range(4)]
        self._drift = drift
        self._strange = 0  # steps in a row; less than 0: too fast
        if price is not None:
            base_s, token_s = max(0.0, price[0]), max(1e-9, price[1])
            self._begin(token_s)
            self._mean = [base_s, token_s, token_s / _CONTEXT_TOKENS, 0.0]
            self._sigma[0] = max(self._sigma[0], base_s)
            self._doubt()

    @property
    def prices(self) -> tuple[float, float, float, float]:
        """(base, token, context, drafting): seconds."""
        base, token, context, drafting = self._mean
        return base, token, context, drafting

    @property
    def drafting_s(self) -> float:
        return self._mean[3]

    def seconds(self, tokens: int, context: float, drafts: bool) -> float:
        """0.0 as long as nothing is known."""
        base, token, each, drafting = self._mean
        return base + token * tokens + each * context + drafting * drafts

    def seconds_per_token(self, context: int) -> float:
        """What one more token costs, with a doubt: as long as that is not known, drafts should be cheap to be tried."""
        return self._mean[1] + _DOUBT * sqrt(self._covariance[1][1]) + self._mean[2] * context

    def learn(self, tokens: float, context: float, drafts: bool, seconds: float) -> None:
        """A step of these took so long."""
        if not self._sigma[0]:
            self._begin(seconds / (tokens + _BASE_TOKENS))
        seen, noise = (1.0, float(tokens), context, float(drafts)), _NOISE * seconds
        if self._has_changed(seen, seconds, noise):
            self._doubt()
        self._absorb(seen, seconds, noise)
        for at, least in enumerate((0.0, _LEAST * self._sigma[1], 0.0, 0.0)):
            if self._mean[at] < least:  # it is at least that: what it took too little, the others have too much
                self._absorb(tuple(float(at == other) for other in range(4)), least, 1e-3 * self._sigma[at])
                self._mean[at] = least
        for at, sigma in enumerate(self._sigma):
            row = self._covariance[at]
            row[at] = min(row[at] + (self._drift * sigma) ** 2, sigma**2)

    def _has_changed(self, seen: tuple[float, ...], value: float, noise: float) -> bool:
        """Whether this step ends a row of strange ones."""
        surprise = value - sum(map(mul, self._mean, seen))
        variance = sum(map(mul, (sum(map(mul, row, seen)) for row in self._covariance), seen)) + noise**2
        if surprise * surprise <= _STRANGE_SIGMAS**2 * variance:
            self._strange = 0
        else:
            self._strange = max(0, self._strange) + 1 if surprise > 0 else min(0, self._strange) - 1
        return abs(self._strange) >= _STRANGE_STEPS

    def _absorb(self, seen: tuple[float, ...], value: float, noise: float) -> None:
        covariance, mean = self._covariance, self._mean
        spread = [sum(map(mul, row, seen)) for row in covariance]
        variance = sum(map(mul, spread, seen)) + noise**2
        most = _MOST_SIGMAS * sqrt(variance)
        surprise = max(-most, min(most, value - sum(map(mul, mean, seen))))
        for at, own in enumerate(spread):
            mean[at] += own / variance * surprise
            row = covariance[at]
            for other, theirs in enumerate(spread):
                row[other] -= own * theirs / variance

    def _begin(self, token_s: float) -> None:
        self._mean = [_BASE_TOKENS * token_s, token_s, 0.0, 0.0]
        self._sigma = [_BASE_TOKENS * token_s, token_s, token_s / _CONTEXT_TOKENS, _BASE_TOKENS * token_s / 2]
        self._doubt()

    def _doubt(self) -> None:
        """What was learnt is as good as a guess."""
        self._covariance = [
            [sigma**2 if at == other else 0.0 for other in range(4)] for at, sigma in enumerate(self._sigma)
        ]
        self._strange = 0


_HOPE = 0.6  # of a draft of which nothing is known
_HOPE_TRIALS = 4.0  # that this is worth
_CLASSES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)  # evidence from each of these on, up to the next, is alike
_FADE = 0.999  # of a class's record, in one step: so that what did not pay is tried again some day
_MEMORY = 0.99  # of a class's record, when something is added
_OWN_MEMORY = 0.85  # of a request's own (SmartSpec's average)
_OWN_TRIALS = 2.0  # that the record of all others is worth beside its own
_SURE = 0.98


class _Record:
    """Drafts that were right, of those that were judged; the first one that is wrong ends the judging."""

    __slots__ = ("hits", "trials")

    def __init__(self) -> None:
        self.hits = self.trials = 0.0


class Chances:
    """The chance that a draft is right if those before it are. A draft that is right is more evidence for the next one:
    so the j-th draft (from 0) with evidence e is judged by all that were drafted with evidence e + j. How much better
    or worse than that a request has done lately makes its own chances better or worse."""

    def __init__(self) -> None:
        self._records = [_Record() for _ in _CLASSES]
        self._own: dict[RequestId, _Record] = {}  # hits, and in `trials` the hits that were to be expected
        self._evidence: dict[RequestId, int] = {}  # of those whose drafts are being verified

    @property
    def best(self) -> float:
        """Of any first draft."""
        return max(self._chance(at) for at in range(len(_CLASSES)))

    def of(self, request_id: RequestId, evidence: int, drafts: int) -> list[float]:
        """That the first of so many drafts is right, that the first two are, ..."""
        own = self._own.get(request_id)
        luck = (own.hits + _OWN_TRIALS) / (own.trials + _OWN_TRIALS) if own else 1.0
        each = (min(_SURE, luck * self._chance(_class(evidence + at))) for at in range(drafts))
        return list(accumulate(each, mul))

    def expect(self, request_id: RequestId, evidence: int) -> None:
        """Drafts with this evidence are being verified."""
        self._evidence[request_id] = evidence

    def learn(self, request_id: RequestId, drafted: int, accepted: int) -> None:
        evidence = self._evidence.pop(request_id, None)
        if evidence is None:
            return
        own = self._own.setdefault(request_id, _Record())
        own.hits *= _OWN_MEMORY
        own.trials *= _OWN_MEMORY
        for at in range(min(accepted + 1, drafted)):
            number = _class(evidence + at)
            own.hits += at < accepted
            own.trials += self._chance(number)
            record = self._records[number]
            record.hits = record.hits * _MEMORY + (at < accepted)
            record.trials = record.trials * _MEMORY + 1

    def forget(self, request_id: RequestId) -> None:
        self._own.pop(request_id, None)
        self._evidence.pop(request_id, None)

    def fade(self) -> None:
        """A step has gone by."""
        for record in self._records:
            record.hits *= _FADE
            record.trials *= _FADE

    def _chance(self, number: int) -> float:
        record = self._records[number]
        return (record.hits + _HOPE * _HOPE_TRIALS) / (record.trials + _HOPE_TRIALS)


def _class(evidence: int) -> int:
    return bisect_right(_CLASSES, evidence) - 1
