"""From logits to tokens, for a whole batch at once and without sorting a vocabulary when a few candidates decide.

The draw for output position i of a request is one uniform number made from (seed, i), turned into a token through the
cumulative distribution. Nothing else enters, so the same seed gives the same tokens in any batch. Sums over the
vocabulary go through `cumsum`, which adds one row's numbers in order whatever the number of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from headrace.core.step import Sampled
from headrace.core.types import Sampling, TokenLogprob

_FIRST_CANDIDATES = 64  # most filters decide among these; a row that needs more asks for more
_GROWTH = 16
NOT_A_NUMBER = -1  # in place of a token: some logit of the row is none


@dataclass(slots=True)
class Row:
    """What sampling knows of one request. `prompt` and `output` count its tokens, for the penalties."""

    sampling: Sampling
    position: int = 0  # how many output tokens it has
    prompt: frozenset[int] = frozenset()
    output: Counter[int] = field(default_factory=Counter)
    allowed: np.ndarray | None = None  # [ceil(vocab / 32)] int32: a bit for each token that may be drawn; None: all

    @classmethod
    def of(cls, sampling: Sampling, prompt_ids: Iterable[int], output_ids: Sequence[int]) -> Row:
        needed = sampling.repetition_penalty != 1
        return cls(sampling, len(output_ids), frozenset(prompt_ids) if needed else frozenset(), Counter(output_ids))

    def drew(self, token: int) -> None:
        self.position += 1
        self.output[token] += 1

    def with_drafts(self, drafts: Sequence[int]) -> list[Row]:
        """This row, and what it will be after the first draft, the first two, ..., if these are drawn."""
        s, output, rows = self.sampling, self.output, [self]
        counted = s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
        for position, token in enumerate(drafts, self.position + 1):
            if counted:
                output = output.copy()
                output[token] += 1
            rows.append(Row(s, position, self.prompt, output))
        return rows


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the two: 53 bits of a BLAKE2 hash."""
    data = seed.to_bytes(16, "little", signed=True) + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def draw(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """A token per row: forbidden ones have no chance, then temperature and filters. May overwrite `logits`."""
    _forbid(logits, rows)
    return _draw(logits, [row.sampling for row in rows], [row.position for row in rows])


def sample(
    logits: Tensor, rows: Sequence[Row], draw: Callable[[Tensor, Sequence[Row]], list[int]] = draw
) -> list[Sampled]:
    """Draw one token per row of `logits` [R, vocab] float32. Does not change `rows`; may overwrite `logits`."""
    raw = _logprob_rows(logits, rows)
    _penalise(logits, rows)
    tokens = draw(logits, rows)
    return [
        Sampled((token,), (describe(raw[index], token, row.sampling.logprobs or 0),) if index in raw else ())
        for index, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def joined(drawn: Sequence[Sampled], drafts: Sequence[int]) -> Sampled:
    """Of one token drawn where each draft was expected, and one after them: those up to the first that is not the
    draft. Each is drawn from the distribution of its position given those before it, so speculation changes nothing."""
    right = next((at for at, draft in enumerate(drafts) if drawn[at].token_ids != (draft,)), len(drafts))
    kept = drawn[: right + 1]
    return Sampled(tuple(one.token_ids[0] for one in kept), tuple(entry for one in kept for entry in one.logprobs))


def describe(logprobs: Tensor, token: int, count: int) -> TokenLogprob:
    """The token's entry in `logprobs` [vocab] and the `count` likeliest."""
    top = torch.topk(logprobs, min(count, len(logprobs))) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
    return TokenLogprob(token, float(logprobs[token]), pairs)


def _logprob_rows(logits: Tensor, rows: Sequence[Row]) -> dict[int, Tensor]:
    """The model's own log-probabilities, before anything is done to the logits, for rows that report them."""
    wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wanted:
        return {}
    return dict(zip(wanted, torch.log_softmax(logits[wanted], -1), strict=True))


def _penalise(logits: Tensor, rows: Sequence[Row]) -> None:
    """Penalties and biases, in place, at the few entries they touch."""
    divided: list[tuple[int, int, float]] = []
    added: list[tuple[int, int, float]] = []
    for index, row in enumerate(rows):
        s = row.sampling
        if s.repetition_penalty != 1:
            divided += [(index, token, s.repetition_penalty) for token in row.prompt | row.output.keys()]
        if s.presence_penalty or s.frequency_penalty:
            added += [(index, t, -s.presence_penalty - n * s.frequency_penalty) for t, n in row.output.items()]
        added += [(index, token, bias) for token, bias in s.logit_bias]
    if divided:
        where, penalty = _entries(divided, logits)
        old = logits[where]
        logits[where] = torch.where(old > 0, old / penalty, old * penalty)
    if added:
        where, amount = _entries(added, logits)
        logits.index_put_(where, amount, accumulate=True)


def _forbid(logits: Tensor, rows: Sequence[Row]) -> None:
    """Give tokens that are not allowed no chance, in place."""
    which = [index for index, row in enumerate(rows) if row.allowed is not None]
    if not which:
        return
    packed = np.stack([row.allowed for row in rows if row.allowed is not None]).view(np.uint8)
    bits = np.unpackbits(packed, axis=1, count=logits.shape[-1], bitorder="little")
    forbidden = torch.from_numpy(bits).to(logits.device) == 0
    if len(which) == len(rows):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        for index, row in zip(which, forbidden, strict=True):
            logits[index].masked_fill_(row, -torch.inf)


def _entries(entries: list[tuple[int, int, float]], like: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    rows, tokens, amounts = zip(*entries, strict=True)
    index = torch.tensor([rows, tokens], device=like.device)
    return (index[0], index[1]), torch.tensor(amounts, dtype=like.dtype, device=like.device)


def _draw(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token per row: the likeliest, or through the cumulative distribution of the whole or the filtered row."""
    best = logits.max(-1)
    tokens = numbers([NOT_A_NUMBER] if best.values.isnan().any() else best.indices.tolist())
    whole = [i for i, s in enumerate(samplings) if s.temperature > 0 and not _filters(s)]
    filtered = [i for i, s in enumerate(samplings) if s.temperature > 0 and _filters(s)]
    for chosen, draw in ((whole, _from_whole), (filtered, _from_candidates)):
        if chosen:
            picked = [samplings[i] for i in chosen]
            points = [uniform(s.seed, positions[i]) for i, s in zip(chosen, picked, strict=True)]
            drawn = draw(_weights(logits, chosen, picked), picked, _column(points, logits))
            for i, token in zip(chosen, drawn, strict=True):
                tokens[i] = token
    return tokens


def numbers(tokens: list[int]) -> list[int]:
    """The tokens. Raises FloatingPointError if there was none for some row because of its logits."""
    if NOT_A_NUMBER in tokens:
        raise FloatingPointError("the model computed a logit that is not a number: are its weights intact?")
    return tokens


def _filters(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def _weights(logits: Tensor, chosen: Sequence[int], samplings: Sequence[Sampling]) -> Tensor:
    """exp of the tempered logits of some rows, scaled so that the likeliest token has weight 1: [R, vocab]."""
    tempered = logits[list(chosen)].div_(_column([s.temperature for s in samplings], logits))
    return tempered.sub_(tempered.amax(-1, keepdim=True)).exp_()


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).to(like.dtype)[:, None]


def _from_whole(weights: Tensor, _: Sequence[Sampling], points: Tensor) -> list[int]:
    return _invert(weights, points).tolist()


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """Index of the first entry whose cumulative weight exceeds the point's share of the total: [R]."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(sums, points * sums[:, -1:], right=True)[:, 0]
    # rounding may push a point to the very end, past the last entry that has any weight
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(-1)
    return torch.minimum(found, last)


def _from_candidates(weights: Tensor, samplings: Sequence[Sampling], points: Tensor) -> list[int]:
    """Draw after top_k, top_p and min_p. Starts from the likeliest few and widens for the rows that need more."""
    totals = weights.cumsum(-1, dtype=torch.float64)[:, -1].tolist()
    tokens = [0] * len(samplings)
    left, count, vocab = list(range(len(samplings))), _FIRST_CANDIDATES, weights.shape[-1]
    while left:
        count = min(count, vocab)
        top = torch.topk(weights[left], count)
        kept, enough = _keep(top.values, [samplings[i] for i in left], [totals[i] for i in left], vocab)
        drawn = top.indices.gather(1, _invert(kept, points[left])[:, None])[:, 0].tolist()
        for index, token in zip(left, drawn, strict=True):
            tokens[index] = token
        left = [index for index, done in zip(left, enough, strict=True) if not done]
        count *= _GROWTH
    return tokens


def _keep(top: Tensor, samplings: Sequence[Sampling], totals: Sequence[float], vocab: int) -> tuple[Tensor, list[bool]]:
    """Zero the candidates [R, count] (likeliest first) that a filter drops, and say for which rows `count` sufficed."""
    count = top.shape[-1]
    ranks = torch.arange(count, device=top.device)
    limits = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings], device=top.device)[:, None]
    kept = top * (ranks < limits)
    sums = kept.cumsum(-1, dtype=torch.float64)
    total = torch.tensor(totals, dtype=torch.float64, device=top.device)[:, None]
    cut_by_rank = limits < vocab
    total = torch.where(cut_by_rank & (limits <= count), sums[:, -1:], total)
    nucleus = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=top.device)[:, None] * total
    floor = torch.tensor([s.min_p for s in samplings], dtype=torch.float64, device=top.device)[:, None]
    before = sums - kept
    chosen = (before < nucleus) & (kept >= floor * kept[:, :1])
    chosen[:, 0] = True
    found = ~cut_by_rank & (sums[:, -1:] >= nucleus) & (nucleus < total)
    rare = (top[:, -1:] < floor) & (~cut_by_rank | (nucleus >= total))  # else the nucleus is a part of the first k
    cut = (limits <= count) | found | rare
    return kept * chosen, (cut[:, 0] | (count == vocab)).tolist()
