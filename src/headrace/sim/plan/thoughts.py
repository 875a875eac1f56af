"""Thinking under a budget (Kinetics, arXiv:2506.05333): what a question costs when N answers of L tokens are drawn for
it, and which N and L a budget buys on a device. What the answers are worth, it does not say.

    eFLOPs = compute + 562.5 x bytes of memory (a B200's FLOP per byte), prompt KV shared by the N
    seconds = N answers side by side by the cost model: prefill + sum over steps, memory allowing; else in turns
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf

from headrace.core.shape import KV_BF16, KVFormat, ModelShape
from headrace.sim.cost.batch import CostModel, batch_of
from headrace.sim.plan.answer import Answer, Part

INTENSITY = 562.5  # FLOP per byte of the paper's device
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)


@dataclass(frozen=True, slots=True)
class Effort:
    """The paper's counts for one question."""

    parameter_flops: float
    attention_flops: float
    kv_bytes: float  # read

    @property
    def eflops(self) -> float:
        return self.parameter_flops + self.attention_flops + INTENSITY * self.kv_bytes

    @property
    def attention_share(self) -> float:
        """Of the whole, what attention takes."""
        return 1 - self.parameter_flops / self.eflops


def effort(shape: ModelShape, prompt: int, output: int, samples: int, kv: KVFormat = KV_BF16) -> Effort:
    """2 P L N; 2 (2 p + L) L N heads D; KV bytes of D: (2 p + L N) L / 2, prompt shared. Weights read are left to the
    batch, as in the paper."""
    wide = shape.heads * shape.head_dim * shape.layers
    attention = 2.0 * (2 * prompt + output) * output * samples * wide
    read = kv.bytes_per_token(shape) * (2 * prompt + output * samples) * output / 2
    return Effort(2.0 * shape.active_weights * output * samples, attention, read)


@dataclass(frozen=True, slots=True)
class Thought:
    """One way to spend on a question."""

    model: str
    samples: int
    tokens: int  # of each
    seconds: float  # of all devices, as if they did nothing else
    usd: float | None
    joules: float
    effort: Effort
    reason: str  # empty: within the budget


@dataclass(frozen=True, slots=True)
class Place:
    """A model on its devices."""

    model: str
    shape: ModelShape
    cost: CostModel
    windows: tuple[int, ...]
    kv_tokens: int
    kv: KVFormat
    usd_per_hour: float | None
    beside: int  # questions that share a step


def thoughts(place: Place, prompt: int, seconds: float | None, usd: float | None) -> Iterator[Thought]:
    """Every N and L. A budget is seconds of the replica per question, or dollars."""
    for tokens in LENGTHS:
        for samples in SAMPLES:
            if prompt + tokens > place.shape.max_context_tokens:
                continue
            took, joules = cost_of(place, prompt, tokens, samples)
            price = None if place.usd_per_hour is None else took * place.usd_per_hour / 3600
            counts = effort(place.shape, prompt, tokens, samples, place.kv)
            reason = _beyond(took, price, seconds, usd)
            yield Thought(place.model, samples, tokens, took, price, joules, counts, reason)


def _beyond(took: float, price: float | None, seconds: float | None, usd: float | None) -> str:
    if took == inf:
        return "not one answer of that length fits into the KV memory"
    if seconds is not None and took > seconds:
        return f"{took:.3g} s are more than {seconds:g} s"
    if usd is not None and price is not None and price > usd:
        return f"${price:.3g} are more than ${usd:g}"
    return ""


def cost_of(place: Place, prompt: int, tokens: int, samples: int) -> tuple[float, float]:
    """(seconds, joules) of the replica for one question when as many questions share its steps as are beside each
    other and fit; the prompt is computed once and its KV shared by the samples."""
    room = int((place.kv_tokens - prompt) // tokens)
    if room < 1:
        return inf, 0.0
    rows = min(room, place.beside * samples)
    step = place.cost.estimate(batch_of([(prompt + tokens // 2, 1)] * rows, rows, place.windows))
    first = place.cost.estimate(batch_of([(0, prompt)], 1, place.windows))
    share = samples / rows  # of a step's rows that are this question's; above 1: in turns
    return first.seconds + tokens * step.seconds * share, first.joules + tokens * step.joules * share


def answer(found: Sequence[Thought], subject: str, budget: str, prompt: int) -> Answer:
    able = [one for one in found if not one.reason]
    rows = [["model", "answers", "tokens each", "seconds", "$", "J", "eFLOPs", "attention"]]
    return Answer(
        f"Thinking with {subject}",
        tuple(_headline(found, able, budget)),
        (
            Part(
                "What fits the budget",
                "Most tokens first; the longest thoughts of equals.",
                [*rows, *map(_row, _best(able))],
            ),
        ),
        tuple(_rejected(found)),
        (
            "Seconds are the cost model's at catalogue peaks with full batches; eFLOPs are the paper's.",
            "How good the answers are is not known here: compare points of equal cost on your own questions.",
            "If bandwidth is 10 % off, seconds of long thoughts are, too: their steps read KV and weights.",
        ),
        (
            "eFLOPs = 2 P L N + 2 (2 p + L) L N heads D + 562.5 x KV bytes x (2 p + L N) L / 2",
            "seconds = prefill(p) + L x step(rows at p + L/2) x N / rows, rows = min(questions x N, KV memory / L)",
            f"p = {prompt} prompt tokens; ceil(N / rows) turns if not all fit",
        ),
        {"thoughts": [{**asdict(one), "eflops": one.effort.eflops} for one in found]},
    )


def _headline(found: Sequence[Thought], able: Sequence[Thought], budget: str) -> Iterator[str]:
    if not able:
        yield f"NOTHING fits {budget}: the least is {min(one.seconds for one in found):.3g} s."
        return
    for model in dict.fromkeys(one.model for one in able):
        mine = [one for one in able if one.model == model]
        long = max(mine, key=lambda one: (one.tokens, one.samples))
        many = max(mine, key=lambda one: (one.samples, one.tokens))
        yield (
            f"{model} within {budget}: {long.samples} x {long.tokens:,} tokens, or {many.samples} x {many.tokens:,}; "
            f"attention is {long.effort.attention_share:.0%} of the longest thought's effort."
        )


def _best(able: Sequence[Thought]) -> list[Thought]:
    """For each model and length the most samples."""
    most: dict[tuple[str, int], Thought] = {}
    for one in able:
        known = most.get((one.model, one.tokens))
        if known is None or one.samples > known.samples:
            most[one.model, one.tokens] = one
    return sorted(most.values(), key=lambda one: (one.model, -one.tokens * one.samples, -one.tokens))


def _row(one: Thought) -> list[str]:
    price = "-" if one.usd is None else f"{one.usd:.5f}"
    return [
        one.model,
        f"{one.samples}",
        f"{one.tokens:,}",
        f"{one.seconds:.3g}",
        price,
        f"{one.joules:,.0f}",
        f"{one.effort.eflops:.2e}",
        f"{one.effort.attention_share:.0%}",
    ]


def _rejected(found: Sequence[Thought]) -> Iterator[str]:
    """The cheapest way of each length that does not fit."""
    for model in dict.fromkeys(one.model for one in found):
        for tokens in LENGTHS:
            beyond = [one for one in found if one.model == model and one.tokens == tokens and one.reason]
            if beyond:
                least = min(beyond, key=lambda one: one.samples)
                yield f"{model}, {least.samples} or more of {tokens:,} tokens: {least.reason}"
