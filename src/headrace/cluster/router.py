"""Which replica a request goes to: small functions of (number of the request, request, views), found by name. Pure: the
simulator and a live fleet ask the same ones, and whoever wants another passes a function.

    round-robin       one after the other, whatever they do
    least-tokens      the fewest unfinished prompt tokens
    least-requests    the fewest unfinished requests
    two-choices       the lighter of two that the number of the request draws (Mitzenmacher, 1996): almost as good as
                      looking at all, and many routers with old views do not all pick the same replica
    prefix            the least work until the first token: unfinished prompt tokens and this prompt's, without what
                      the replica has cached of it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from headrace.cluster.view import ReplicaView
from headrace.core.types import Request

Route = Callable[[int, Request, Sequence[ReplicaView]], int]


def round_robin(number: int, request: Request, views: Sequence[ReplicaView]) -> int:
    """One after the other. Needs no feedback, so the replicas are independent of each other."""
    return views[number % len(views)].replica


def least_tokens(number: int, request: Request, views: Sequence[ReplicaView]) -> int:
    """Where the fewest prompt tokens are unfinished; the first of equals."""
    return min(views, key=lambda view: view.prompt_tokens).replica


def least_requests(number: int, request: Request, views: Sequence[ReplicaView]) -> int:
    """Where the fewest requests are unfinished; the first of equals."""
    return min(views, key=lambda view: view.requests).replica


def two_choices(number: int, request: Request, views: Sequence[ReplicaView]) -> int:
    """The lighter of two different replicas."""
    count = len(views)
    if count < 3:
        return least_tokens(number, request, views)
    first, step = divmod(_mixed(number), count - 1)
    first %= count
    return least_tokens(number, request, (views[first], views[(first + 1 + step) % count]))


def prefix(number: int, request: Request, views: Sequence[ReplicaView]) -> int:
    """Where the first token needs the least work."""
    return min(views, key=lambda view: view.prompt_tokens - view.cached_tokens).replica


def _mixed(number: int) -> int:
    """64 bits that look random and are the same everywhere (Steele, Lea and Flood's SplitMix, 2014)."""
    mask = (1 << 64) - 1
    mixed = (number + 1) * 0x9E3779B97F4A7C15 & mask
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    return mixed ^ mixed >> 31


ROUTES: Mapping[str, Route] = {
    "round-robin": round_robin,
    "least-tokens": least_tokens,
    "least-requests": least_requests,
    "two-choices": two_choices,
    "prefix": prefix,
}
