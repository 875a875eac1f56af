"""What a number format costs in quality: the same text judged twice, token by token, and compared.

A text is cut into windows, and each goes through a `Service` as a request that asks for the log-probabilities of its
own prompt: what is judged is what serves. Holds no model; owns nothing.

    perplexity    exp of the mean of -log p(token | what came before it in its window); a format's is given as a ratio
    agreement     share of positions where both think the same token likeliest
    KL            sum of p log(p / q) over next tokens, p the reference: how far the whole prediction moves
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean, pstdev

from headrace.core import clock
from headrace.core.ports import Service
from headrace.core.types import HeadraceError, Request, Sampling, TokenLogprob, Tokens

TOP = 64  # likeliest tokens that are compared one by one; what is left counts as one
WINDOW_TOKENS = 512
_TOGETHER = 64  # windows in flight
_MOST_TEXT_BYTES = 64 << 20

Judged = tuple[TokenLogprob, ...]  # one per token of the text that has one before it in its window


class Unjudgeable(HeadraceError):
    """The text or the engine is not fit for the question."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One format against the reference, over all judged tokens."""

    tokens: int
    perplexity: float
    ratio: float  # perplexity over the reference's
    ratio_error: float  # standard error of that, the tokens taken as independent
    agreement: float  # share
    kl_mean: float  # nats; at least so much, as all but the likeliest tokens count as one
    kl_p99: float


def text(path: Path | None = None) -> str:
    """A file's text, or English prose that was written for this. Raises Unjudgeable."""
    if path is None:
        return resources.files("headrace.bench").joinpath("data/prose.txt").read_text("utf-8")
    try:
        if path.stat().st_size > _MOST_TEXT_BYTES:
            raise Unjudgeable(f"{path} is larger than {_MOST_TEXT_BYTES >> 20} MiB; give a shorter text")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unjudgeable(f"cannot read {path}: {error}") from error


def windows(ids: Sequence[int], size: int, begin: Sequence[int] = ()) -> Iterator[tuple[int, ...]]:
    """Stretches of at most `size` tokens, each after `begin`; none so short that there is nothing to judge."""
    room = size - len(begin)
    for first in range(0, len(ids), room):
        window = (*begin, *ids[first : first + room])
        if len(window) > 1:
            yield window


async def judge(
    service: Service, prompts: Sequence[tuple[int, ...]], heard: Callable[[float], None] = lambda _: None
) -> Judged:
    """What the model thinks of every token of every prompt but the first. Raises Unjudgeable if a step failed."""
    places, done = asyncio.Semaphore(_TOGETHER), 0

    async def one(number: int, ids: tuple[int, ...]) -> list[TokenLogprob]:
        nonlocal done
        sampling = Sampling(temperature=0.0, prompt_logprobs=TOP)
        found: list[TokenLogprob] = []
        async with places:
            request = Request(f"quality {number}", (Tokens(ids),), clock.now(), 1, sampling)
            async for output in service.generate(request):
                if output.error:
                    raise Unjudgeable(f"judging failed: {output.error}")
                found += output.prompt_logprobs
        done += 1
        heard(done / len(prompts))
        return found

    parts = await asyncio.gather(*(one(number, ids) for number, ids in enumerate(prompts)))
    return tuple(entry for part in parts for entry in part)


def compare(reference: Judged, other: Judged) -> Quality:
    """Raises Unjudgeable if they are not judgements of the same tokens, or of none."""
    if [one.token_id for one in reference] != [one.token_id for one in other]:
        raise Unjudgeable("the two judged different tokens")
    if not reference:
        raise Unjudgeable("there is nothing to judge; give a text of some words at least")
    worse = [one.logprob - two.logprob for one, two in zip(reference, other, strict=True)]
    ratio = math.exp(fmean(worse))
    kl = sorted(divergence(one, two) for one, two in zip(reference, other, strict=True))
    return Quality(
        tokens=len(reference),
        perplexity=math.exp(-fmean(one.logprob for one in other)),
        ratio=ratio,
        ratio_error=ratio * pstdev(worse) / math.sqrt(len(worse)),
        agreement=fmean(one.top[0][0] == two.top[0][0] for one, two in zip(reference, other, strict=True)),
        kl_mean=fmean(kl),
        kl_p99=kl[min(len(kl) - 1, int(0.99 * len(kl)))],
    )


def divergence(reference: TokenLogprob, other: TokenLogprob) -> float:
    """KL of the reference from the other, in nats, over the tokens that both list and all others as one. Putting tokens
    together never makes it larger."""
    p, q = (dict((*one.top, (one.token_id, one.logprob))) for one in (reference, other))
    both = p.keys() & q.keys()
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    rest_p, rest_q = (1.0 - math.fsum(math.exp(one[token]) for token in both) for one in (p, q))
    if rest_p > 1e-9 and rest_q > 1e-9:  # below, it is rounding
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)
