"""What sampling knows of a request, and what every way to draw has in common. The draws are made by whoever has the
logits: `draws` with torch, or native code.

The draw for output position i of a request is one uniform number made from (seed, i), turned into a token through the
cumulative distribution. Nothing else enters, so the same seed gives the same tokens in any batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from headrace.core.step import Sampled
from headrace.core.types import Sampling, TokenLogprob

Entry = tuple[int, int, float]  # row of the logits, token, number

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


def joined(drawn: Sequence[Sampled], drafts: Sequence[int]) -> Sampled:
    """Of one token drawn where each draft was expected, and one after them: those up to the first that is not the
    draft. Each is drawn from the distribution of its position given those before it, so speculation changes nothing."""
    right = next((at for at, draft in enumerate(drafts) if drawn[at].token_ids != (draft,)), len(drafts))
    kept = drawn[: right + 1]
    return Sampled(tuple(one.token_ids[0] for one in kept), tuple(entry for one in kept for entry in one.logprobs))


def reporting(rows: Sequence[Row]) -> list[int]:
    """Of which rows somebody wants to know the log-probabilities, as the model has them: before any penalty."""
    return [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]


def sampled(
    tokens: Sequence[int], rows: Sequence[Row], reported: Callable[[int, int, int], TokenLogprob]
) -> list[Sampled]:
    """What was drawn. `reported` tells of a row that somebody wants to know of, by its number: (row, token, others)."""
    return [
        Sampled((token,), () if (count := row.sampling.logprobs) is None else (reported(index, token, count),))
        for index, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def penalties(rows: Sequence[Row]) -> tuple[list[Entry], list[Entry]]:
    """The few logits that penalties and biases touch: what a positive one is divided by and a negative one multiplied
    with; then, what is added."""
    divided, added = list[Entry](), list[Entry]()
    for index, row in enumerate(rows):
        s = row.sampling
        if s.repetition_penalty != 1:
            divided += [(index, token, s.repetition_penalty) for token in row.prompt | row.output.keys()]
        if s.presence_penalty or s.frequency_penalty:
            added += [(index, t, -s.presence_penalty - n * s.frequency_penalty) for t, n in row.output.items()]
        added += [(index, token, bias) for token, bias in s.logit_bias]
    return divided, added


def numbers(tokens: list[int]) -> list[int]:
    """The tokens. Raises FloatingPointError if there was none for some row because of its logits."""
    if NOT_A_NUMBER in tokens:
        raise FloatingPointError("the model computed a logit that is not a number: are its weights intact?")
    return tokens
