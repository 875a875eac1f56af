"""Replicas that only compute prompts and replicas that only decode (DistServe, OSDI 2024): who gets a request, and when
its KV may move. Pure functions over frozen views; the simulator and a live fleet ask the same ones.

    request --prefill_of--> prefill replica --KV offered--> decode_of --accepts? pull--> decode replica
                 |                 |                                         |
               no room: wait       '---- keeps the KV until it was pulled ---'
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from headrace.cluster.view import ReplicaView
from headrace.core.types import HeadraceError

OFFERED_SHARE = 0.05  # of a decode replica's blocks may be promised to requests that wait (DistServe's threshold)


class NoReplica(HeadraceError):
    """Nobody plays the role that is needed."""


def prefill_of(views: Sequence[ReplicaView], blocks: int = 0) -> int | None:
    """Where the fewest prompt tokens wait, of those with room for a prompt of so many blocks; the first of equals.
    None: the prompt waits, as prefill replicas are full of KV that nobody has pulled. Raises NoReplica."""
    able = [view for view in views if view.role != "decode"]
    if not able:
        raise NoReplica("no replica computes prompts; give one the role prefill or both")
    roomy = [view for view in able if blocks <= view.free_blocks]
    return min(roomy, key=lambda view: view.prompt_tokens).replica if roomy else None


def decode_of(views: Sequence[ReplicaView]) -> int:
    """Where the fewest requests run; the first of equals. Raises NoReplica."""
    able = [view for view in views if view.role != "prefill"]
    if not able:
        raise NoReplica("no replica decodes; give one the role decode or both")
    return min(able, key=lambda view: view.requests).replica


def accepts(view: ReplicaView, blocks: int) -> bool:
    """Whether a decode replica pulls a request of so many blocks now. Otherwise its KV stays where it was computed, and
    a prefill replica that fills up so stops: that is the back-pressure."""
    crowded = view.offered_blocks >= OFFERED_SHARE * view.blocks
    return not crowded and blocks <= view.free_blocks


def instances(rate: float, per_prefill: float, per_decode: float) -> tuple[int, int]:
    """The fewest (prefill, decode) instances for so many requests per second, when one serves so many of its phase."""
    return max(1, ceil(rate / per_prefill - 1e-9)), max(1, ceil(rate / per_decode - 1e-9))


def balance(per_prefill: float, per_decode: float, sizes: tuple[int, int], most: int = 4) -> tuple[int, int]:
    """The numbers of (prefill, decode) instances, at most so many of each, that serve the most per device when an
    instance has so many devices and serves so many requests per second of its phase; the fewest of equals."""

    def worth(counts: tuple[int, int]) -> tuple[float, int]:
        devices = counts[0] * sizes[0] + counts[1] * sizes[1]
        return round(min(counts[0] * per_prefill, counts[1] * per_decode) / devices, 9), -devices

    return max(((n, m) for n in range(1, most + 1) for m in range(1, most + 1)), key=worth)
