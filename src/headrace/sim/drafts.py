"""Speculation where tokens have no values: a drafter that guesses as many as it is asked for, and the law of how many
of them are right. Whether a guess is right depends on the seed, the request and its position only, never on the batch;
so the same traffic under other settings meets the same luck.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from headrace.core.config import BadSetting
from headrace.core.types import RequestId
from headrace.engine.policy import Draft, RequestView
from headrace.workload.arrival import ANSWER_TOKEN


def guesses(request: RequestView, most: int) -> Draft:
    """A drafter."""
    return Draft((ANSWER_TOKEN,) * most, 0)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The j-th draft of a step is right with a chance of its own if those before it are: `low[j]` to `high[j]`, the
    last of these for all further ones, the same way between them for all drafts of one request."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    seed: int = 0

    def accepted(self, request_id: RequestId, position: int, drafts: int) -> int:
        """How many of so many drafts are right, the first of which is for this position of the text."""
        between, last = _uniform(self.seed, request_id, "rate"), len(self.low) - 1
        for at in range(drafts):
            low, high = self.low[min(at, last)], self.high[min(at, last)]
            if _uniform(self.seed, request_id, position + at) >= low + between * (high - low):
                return at
        return drafts


def parse_acceptance(text: str, seed: int = 0) -> Acceptance:
    """'0.7' for every draft, '0.8,0.7,0.5' by its place in the step, '0.2:0.9' by request, between these; or both,
    '0.5:0.9,0.3:0.8'. Raises BadSetting."""
    try:
        parts = [[float(one) for one in part.split(":")] for part in text.split(",")]
    except ValueError:
        parts = []
    if not parts or not all(len(part) <= 2 and all(0 <= one <= 1 for one in part) for part in parts):
        raise BadSetting(f"--draft-acceptance {text!r} is not a chance such as 0.7, or 0.8,0.7,0.5, or 0.2:0.9")
    return Acceptance(tuple(part[0] for part in parts), tuple(part[-1] for part in parts), seed)


def _uniform(seed: int, request_id: RequestId, what: str | int) -> float:
    """In [0, 1)."""
    content = f"{seed}/{what}/{request_id}".encode("utf-8", "surrogatepass")
    return (int.from_bytes(blake2b(content, digest_size=8).digest(), "little") >> 11) * 2.0**-53
