"""From logits to tokens with torch, for a whole batch at once and without sorting a vocabulary when a few candidates
decide. Sums over the vocabulary go through `cumsum`, which adds one row's numbers in order whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.core.step import Sampled
from headrace.core.types import Sampling, TokenLogprob
from headrace.device.sampler import NOT_A_NUMBER, Entry, Row, numbers, penalties, reporting, sampled, uniform

_FIRST_CANDIDATES = 64  # most filters decide among these; a row that needs more asks for more
_GROWTH = 16


def draw(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """A token per row: forbidden ones have no chance, then temperature and filters. May overwrite `logits`."""
    _forbid(logits, rows)
    return _draw(logits, [row.sampling for row in rows], [row.position for row in rows])


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Draw one token per row of `logits` [R, vocab] float32. Does not change `rows`; may overwrite `logits`."""
    wanted = reporting(rows)
    raw = dict(zip(wanted, torch.log_softmax(logits[wanted], -1), strict=True)) if wanted else {}
    _penalise(logits, rows)
    return sampled(draw(logits, rows), rows, lambda index, token, count: describe(raw[index], token, count))


def describe(logprobs: Tensor, token: int, count: int) -> TokenLogprob:
    """The token's entry in `logprobs` [vocab] and the `count` likeliest."""
    top = torch.topk(logprobs, min(count, len(logprobs))) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
    return TokenLogprob(token, float(logprobs[token]), pairs)


def _penalise(logits: Tensor, rows: Sequence[Row]) -> None:
    """Penalties and biases, in place."""
    divided, added = penalties(rows)
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


def _entries(entries: list[Entry], like: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
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
