"""What is done to logits before native code draws from them, and what is told of them: numpy, in place where it can be.
`headrace.device.reference.draws` is the same with torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.core.types import TokenLogprob
from headrace.device.sampler import Entry, Row, penalties


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of every row of [R, vocab]."""
    below = logits - logits.max(-1, keepdims=True)
    below -= np.log(np.exp(below).sum(-1, keepdims=True))
    return below


def describe(logprobs: np.ndarray, token: int, count: int) -> TokenLogprob:
    """The token's entry in `logprobs` [vocab] and the `count` likeliest."""
    count = min(count, len(logprobs))
    top = np.argpartition(-logprobs, count - 1)[:count] if count else np.empty(0, np.int64)
    top = top[np.argsort(-logprobs[top], kind="stable")]
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(top.tolist(), logprobs[top].tolist(), strict=True)))


def penalise(logits: np.ndarray, rows: Sequence[Row]) -> None:
    """Penalties and biases, in place."""
    divided, added = penalties(rows)
    if divided:
        where, penalty = _entries(divided)
        old = logits[where]
        logits[where] = np.where(old > 0, old / penalty, old * penalty)
    if added:
        where, amount = _entries(added)
        np.add.at(logits, where, amount)  # a token may be there several times


def _entries(entries: list[Entry]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    rows, tokens, amounts = zip(*entries, strict=True)
    return (np.array(rows), np.array(tokens)), np.array(amounts, dtype=np.float32)
