"""The lives of some requests, for a timeline: all while they are few, then every second one, every fourth, ..."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.core.events import Finished

MOST_LIVES = 480  # kept; beyond that every second one is dropped

# (arrival, first admission or None, first token or None, end; seconds), (prompt, output, cached tokens), how it ended
Life = tuple[float, float | None, float | None, float, int, int, int, str]


@dataclass(slots=True)
class Lives:
    """A bounded sample by the order in which requests ended."""

    every: int = 1
    seen: int = 0
    kept: list[Life] = field(default_factory=list)

    def add(self, event: Finished) -> None:
        if self.seen % self.every == 0:
            usage = event.usage
            times = (event.arrival_s, event.first_admitted_s, event.first_token_s, event.at_s)
            counts = (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens)
            self.kept.append((*times, *counts, event.reason.value))
            self._thin()
        self.seen += 1

    def merge(self, other: Lives) -> None:
        """Add those of another replica, as thinly sampled as the thinner of the two."""
        every = max(self.every, other.every)
        self.kept = self.kept[:: every // self.every] + other.kept[:: every // other.every]
        self.every = every
        self.seen += other.seen
        self._thin()

    def _thin(self) -> None:
        while len(self.kept) > MOST_LIVES:
            self.kept = self.kept[::2]
            self.every *= 2
