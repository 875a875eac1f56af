"""Made-up views for tests of policies alone."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from engine_rig import make_request

from headrace.core.types import Request
from headrace.engine.policy import PoolView, Share


@dataclass
class View:
    """A RequestView by hand."""

    request: Request = field(default_factory=lambda: make_request("view", range(4)))
    prompt_tokens: int = 10
    known_tokens: int = 10
    computed_tokens: int = 0
    pending_tokens: int = 0
    limit_tokens: int = 20
    held_blocks: int = 0
    cached_blocks: int = 0
    queued_s: float = 0.0
    running: bool = False
    preemptions: int = 0

    def token_ids(self, start: int, end: int) -> None:
        return None


def arriving(arrival_s: float, level: int = 0) -> View:
    return View(make_request("view", range(4), arrival_s=arrival_s, priority=level))


def pool(**more: Any) -> PoolView:
    numbers = {"total_blocks": 100, "free_blocks": 100, "promised_blocks": 0, "reserved_blocks": 0}
    return PoolView(**{**numbers, "block_tokens": 4, "running": (), **more})


def play(former: Generator[Share, int, None], granted: list[int]) -> list[Share]:
    """The wishes of a batch policy that is granted so much for each."""
    shares = [next(former)]
    for tokens in granted:
        try:
            shares.append(former.send(tokens))
        except StopIteration:
            break
    return shares
