"""Admission by predicted memory: a request may start if the highest point that memory will come to, when everybody goes
on to its predicted end, stays below what there is. Owns nothing but the predictor's past.

    tokens  |        .            each request grows by one token a step and leaves at its end, so memory is highest
            |     . ||    .       right before somebody leaves: sorted by what is left, longest first,
            |  . '  ||. ' |
            |'      |'    |.      M* = max over k of  h_1 + .. + h_k  +  k * r_k
            '-------+-----+---> steps            (h: tokens now, r: tokens to come)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter

from headrace.core.config import EngineSettings
from headrace.core.events import Event
from headrace.core.types import RequestId
from headrace.engine.policies.joints import PoolView, RequestView
from headrace.engine.policies.lengths import Lengths

RESERVED = 0.03  # share of memory kept free against predictions that are too short
MOST_DRAWS = 5
_GOLDEN = 0.6180339887498949  # multiples of it modulo one are spread as evenly as can be

Predict = Callable[[RequestView], float]  # -> output tokens it will come to


class FuturePeak:
    """Says yes if M* stays below all memory but a share `reserved`, in each of `draws` predictions of a batch of some
    size. Blocks that several requests hold count in shares. Nobody overtakes: who is refused is asked again first.

    The bound: with an ordering that does not starve, none beyond it; an empty replica starts anybody.
    """

    def __init__(self, predict: Predict, reserved: float, draws: Callable[[int], int] = lambda batch: 1) -> None:
        self._predict = predict
        self._reserved = reserved
        self._draws = draws

    def __call__(self, request: RequestView, pool: PoolView) -> bool:
        room = (1 - self._reserved) * pool.total_blocks * pool.block_tokens
        own = request.known_tokens + (pool.block_tokens - 1) / 2 - request.cached_blocks * pool.block_tokens
        held = [own, *_held(pool)]  # the last block of each is half full, as a mean
        if sum(held) > room:
            return False
        requests = (request, *pool.running)
        return all(self._peak(requests, held) <= room for _ in range(self._draws(len(requests))))

    def _peak(self, requests: tuple[RequestView, ...], held: list[float]) -> float:
        left = [max(0.0, self._predict(one) - 1 - (one.known_tokens - one.prompt_tokens)) for one in requests]
        peak = tokens = 0.0
        for count, (r, h) in enumerate(sorted(zip(left, held, strict=True), key=itemgetter(0), reverse=True), 1):
            tokens += h
            peak = max(peak, tokens + count * r)
        return peak


def _held(pool: PoolView) -> list[float]:
    """Tokens that each running request holds, or will soon for what it knows, its part of shared blocks only."""
    blocks = sum(one.held_blocks for one in pool.running)
    used = pool.total_blocks - pool.free_blocks
    shared_tokens = pool.block_tokens * max(0.0, 1 - used / max(blocks, 1))  # of each block
    half = (pool.block_tokens - 1) / 2
    return [one.known_tokens + half - one.held_blocks * shared_tokens for one in pool.running]


class PastFuture:
    """Future memory predicted from past lengths: the scheduler of the paper of that name (LightLLM).

    Every running request's end is drawn from the past lengths beyond what it has drawn already, the newcomer's from all
    of them; min(5, 200 / batch + 1) such draws must all fit. W = `length_window` (1000), reserved 3 % of memory. The
    draws follow a golden-ratio sequence instead of a random one: as even, and the same in every replay.
    """

    def __init__(self, settings: EngineSettings, reserved: float = RESERVED) -> None:
        self._lengths = Lengths(settings.length_window)
        self._share = 0.0
        self._admission = FuturePeak(self._draw, reserved, lambda batch: min(MOST_DRAWS, 200 // batch + 1))

    def observe(self, event: Event) -> None:
        self._lengths.observe(event)

    def __call__(self, request: RequestView, pool: PoolView) -> bool:
        return self._admission(request, pool)

    def _draw(self, request: RequestView) -> float:
        self._share = (self._share + _GOLDEN) % 1.0
        prompt = request.prompt_tokens
        return self._lengths.quantile(self._share, request.known_tokens - prompt, request.limit_tokens - prompt)


_TO_THE_LIMIT = FuturePeak(lambda one: one.limit_tokens - one.prompt_tokens, 0.0)
_AT_AN_END = FuturePeak(lambda one: one.known_tokens - one.prompt_tokens, 0.01)


def conservative(request: RequestView, pool: PoolView) -> bool:
    """As if everybody came to its limit: nobody is ever preempted but for blocks that turn out not to be shared, and
    memory stays half empty if limits are generous. Also BatchLLM's memory-centric batching: as many as memory holds."""
    return _TO_THE_LIMIT(request, pool)


def aggressive(request: RequestView, pool: PoolView) -> bool:
    """As if everybody ended now: whoever fits into 99 % of memory starts, and many are preempted later."""
    return _AT_AN_END(request, pool)


class Oracle:
    """`PastFuture` with nothing to predict: for simulations, which know the `lengths` of answers, to compare with."""

    def __init__(self, lengths: Mapping[RequestId, int]) -> None:
        self._admission = FuturePeak(lambda one: lengths[one.request.id], 0.0)

    def __call__(self, request: RequestView, pool: PoolView) -> bool:
        return self._admission(request, pool)
