"""The port between the executor and whatever computes, native kernels or torch. Knows neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from headrace.core.shape import ModelShape
from headrace.core.step import Sampled
from headrace.core.types import TokenLogprob
from headrace.device.sampler import Row

States = Any  # [rows, hidden], an array of whoever computes: others cut it by rows, and hand it back


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows one request has in a step, consecutive in the batch and in position."""

    first_row: int
    start: int  # position of the first
    count: int
    blocks: np.ndarray  # int64 block table covering at least start + count positions


class Forward(Protocol):
    """Sends rows through layers and over the KV memory that it holds. Under several lanes two threads call at once, for
    other rows and other blocks."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Rows that are computed for so many or fewer, ascending; multiples of the last beyond it."""
        ...

    def layers(self, spans: Sequence[Rows], first: int, last: int, ids: Sequence[int], x: States | None) -> States:
        """Layers first, ..., last - 1 of consecutive spans: [rows, hidden], then perhaps padding. They begin with token
        `ids` if `first` is 0, else with `x` [rows, hidden], which stays as it is."""
        ...

    def joined(self, parts: Sequence[States]) -> States:
        """One after the other, in memory of its own."""
        ...

    def sample(self, hidden: States, chosen: np.ndarray, rows: Sequence[Row]) -> list[Sampled]:
        """Draw a token for each of the `chosen` rows after the last layer. Does not change `rows`."""
        ...

    def judged(self, hidden: States, chosen: np.ndarray, tokens: Sequence[int], count: int) -> Sequence[TokenLogprob]:
        """What the `chosen` rows after the last layer thought of these tokens, and their `count` likeliest."""
        ...
