"""Laws of numbers, as text and as functions of a generator: lengths in tokens, gaps in seconds, who is popular.

    128                  always                      ln:128:0.8      log-normal: median, sigma of the logarithm
    64:256               uniform, both included      gamma:2:1.5     Gamma: mean, coefficient of variation
    exp:2.5              exponential of that mean    zipf:1.1:1:4096 P(k) ~ k^-1.1 over the whole numbers 1 to 4096
    0.1@80+30@20         one of several laws, by weight

A law is pure: the same generator in the same state gives the same draw. Joint laws of prompt and answer are at the end.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random

from headrace.core.config import BadSetting
from headrace.workload.arrival import MAX_TOKENS
from headrace.workload.corpora import CORPORA, LEVELS, Corpus

Law = Callable[[Random], float]
Count = Callable[[Random], int]
Pairs = Callable[[Random], tuple[int, int]]  # prompt tokens, output tokens

_MOST = 1e12
_FORMS = "N, LO:HI, exp:MEAN, ln:MEDIAN:SIGMA, gamma:MEAN:CV, zipf:S:LO:HI or a mixture LAW@WEIGHT+LAW@WEIGHT"


def parse_law(text: str) -> Law:
    """The law that `text` writes; its draws are finite and never negative. Raises BadSetting."""
    try:
        if "@" in text:
            return _mixture(text)
        name, *rest = text.split(":")
        if name in _LAWS:
            return _LAWS[name](*map(float, rest))
        return _uniform(*map(float, text.split(":")))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadSetting(f"{text!r} is not a law; write {_FORMS}") from error


def parse_count(text: str, least: int = 1, most: int = MAX_TOKENS) -> Count:
    """A law of whole numbers in [least, most]: draws are rounded, and cut at the bounds. Raises BadSetting."""
    low, _, high = text.partition(":")
    if low.isdecimal() and (not high or high.isdecimal()):  # uniform over whole numbers, not rounded from a stretch
        first, last = int(low), int(high or low)
        if not least <= first <= last <= most:
            raise BadSetting(f"{text!r} is not N or LO:HI within {least} to {most}")
        return lambda rng: rng.randint(first, last)
    law = parse_law(text)
    return lambda rng: min(most, max(least, round(law(rng))))


def fixed(value: float) -> Law:
    _require(0 <= value <= _MOST)
    return lambda rng: value


def _uniform(low: float, high: float | None = None) -> Law:
    if high is None:
        return fixed(low)
    _require(0 <= low <= high <= _MOST)
    return lambda rng: rng.uniform(low, high)


def exponential(mean: float) -> Law:
    _require(0 < mean <= _MOST)
    return lambda rng: rng.expovariate(1 / mean)


def log_normal(median: float, sigma: float) -> Law:
    """Mean is median * exp(sigma^2 / 2)."""
    _require(0 < median <= _MOST and 0 <= sigma <= 10)
    mu = math.log(median)
    return lambda rng: min(_MOST, rng.lognormvariate(mu, sigma))


def gamma(mean: float, cv: float) -> Law:
    """Shape 1 / cv^2; cv 1 is exponential."""
    _require(0 < mean <= _MOST and 1e-3 <= cv <= 100)
    shape = cv**-2
    return lambda rng: rng.gammavariate(shape, mean / shape)


def zipf(exponent: float, low: float, high: float) -> Law:
    """P(k) ~ k^-exponent over whole k in [low, high]; exponent 0 is uniform.

    Rejection-inversion (Hoermann and Derflinger, 1996): k^-s is replaced by its integral H over [k-1/2, k+1/2], which
    has an inverse, and a draw is kept where the histogram is below it. No table, about one draw per number.
    """
    _require(0 <= exponent <= 20 and 1 <= low <= high <= MAX_TOKENS and low == int(low) and high == int(high))

    power = 1 - exponent
    logarithmic = abs(power) < 1e-9

    def area(x: float) -> float:
        return math.log(x) if logarithmic else float((x**power - 1) / power)

    def inverse(y: float) -> float:
        return math.exp(y) if logarithmic else float(max(1 + y * power, 5e-324) ** (1 / power))

    start, end = area(low - 0.5), area(high + 0.5)

    def draw(rng: Random) -> float:
        while True:
            u = rng.uniform(start, end)
            k = min(high, max(low, float(round(inverse(u)))))
            if u >= area(k + 0.5) - k**-exponent:
                return k

    return draw


def _mixture(text: str) -> Law:
    parts = [part.partition("@") for part in text.split("+")]
    laws = [parse_law(law) for law, _, _ in parts]
    weights = [float(weight) for _, _, weight in parts]
    _require(all(0 <= weight <= _MOST for weight in weights) and sum(weights) > 0)
    limits = list(accumulate(weights))
    return lambda rng: laws[min(bisect_right(limits, rng.random() * limits[-1]), len(laws) - 1)](rng)


_LAWS: dict[str, Callable[..., Law]] = {"exp": exponential, "ln": log_normal, "gamma": gamma, "zipf": zipf}


def parse_pairs(text: str) -> Pairs:
    """Prompt and answer lengths: 'PROMPT,OUTPUT' drawn independently, a corpus by name, or a reasoning model's.

    'reasoning', 'reasoning:MEAN', 'reasoning:MEAN:SIGMA' and 'reasoning:MEAN:SIGMA:CAP' with MEAN, SIGMA of the
    thinking and CAP of all output. Raises BadSetting.
    """
    name, *rest = text.split(":")
    if name in CORPORA and not rest:
        return corpus(CORPORA[name])
    try:
        if name == "reasoning":
            return reasoning(*map(float, rest))
        prompt, output = text.split(",")
    except (ValueError, TypeError) as error:
        known = ", ".join((*CORPORA, "reasoning[:MEAN[:SIGMA[:CAP]]]"))
        raise BadSetting(f"lengths {text!r} are not PROMPT,OUTPUT with two laws, nor one of {known}") from error
    return independent(parse_count(prompt), parse_count(output))


def independent(prompt: Count, output: Count) -> Pairs:
    return lambda rng: (prompt(rng), output(rng))


def empirical(prompts: Sequence[int], outputs: Sequence[int]) -> Pairs:
    """Recorded pairs drawn with replacement, each kept together."""
    count = len(prompts)
    if count == 0 or count != len(outputs):
        raise BadSetting("there are no recorded lengths to draw from")

    def draw(rng: Random) -> tuple[int, int]:
        at = rng.randrange(count)
        return prompts[at], outputs[at]

    return draw


def corpus(lengths: Corpus) -> Pairs:
    """Lengths whose marginal laws are the corpus's quantiles, tied by a Gaussian copula of its correlation of ranks."""
    weight, rest = lengths.correlation, math.sqrt(1 - lengths.correlation**2)

    def level(x: float) -> float:
        return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))

    def draw(rng: Random) -> tuple[int, int]:
        x = rng.gauss(0.0, 1.0)
        y = weight * x + rest * rng.gauss(0.0, 1.0)
        return _at_level(lengths.prompt, level(x)), _at_level(lengths.output, level(y))

    return draw


def reasoning(mean: float = 5000.0, sigma: float = 1.0, cap: float = 32_768.0) -> Pairs:
    """A reasoning model asked what ShareGPT's users asked: it thinks, then answers as long as theirs did.

    Thinking is log-normal. Studies of reasoning models under load report heavy-tailed answers of 3,000 to 8,000
    tokens with sigma of 1 or more, cut at 16,384 or 32,768; `mean` is that of the thinking before the cut.
    """
    if not (1 <= mean <= MAX_TOKENS and 0 <= sigma <= 10 and 2 <= cap <= MAX_TOKENS):
        raise BadSetting(f"reasoning:{mean:g}:{sigma:g}:{cap:g} needs a mean and a cap in tokens and a sigma up to 10")
    thinking = log_normal(mean / math.exp(sigma**2 / 2), sigma)
    pair = corpus(CORPORA["sharegpt"])

    def draw(rng: Random) -> tuple[int, int]:
        prompt, answer = pair(rng)
        return prompt, min(int(cap), max(1, round(thinking(rng))) + answer)

    return draw


def _at_level(quantiles: Sequence[int], level: float) -> int:
    """The quantile at `level`, between two known ones on the straight line of the logarithm."""
    at = min(max(bisect_right(LEVELS, level), 1), len(LEVELS) - 1)
    part = (level - LEVELS[at - 1]) / (LEVELS[at] - LEVELS[at - 1])
    low, high = quantiles[at - 1], quantiles[at]
    return max(1, round(float(low * (high / low) ** part)))


def _require(condition: bool) -> None:
    """NaN fails every comparison, so conditions say what must hold."""
    if not condition:
        raise ValueError("out of bounds")
