"""Replicas that only compute prompts and replicas that only decode (DistServe, OSDI 2024): who gets a request, and when
its KV may move. Pure functions over frozen views; the simulator and a live fleet ask the same ones.

    request --prefill_of--> prefill replica --KV offered--> decode_of --accepts? pull--> decode replica
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.cluster.view import ReplicaView
from headrace.core.types import HeadraceError

OFFERED_SHARE = 0.05  # of a decode replica's blocks may be promised to requests that wait (DistServe's threshold)


class NoReplica(HeadraceError):
    """Nobody plays the role that is needed."""


def prefill_of(views: Sequence[ReplicaView]) -> int:
    """Where the fewest prompt tokens wait; the first of equals. Raises NoReplica."""
    able = [view for view in views if view.role != "decode"]
    if not able:
        raise NoReplica("no replica computes prompts; give one the role prefill or both")
    return min(able, key=lambda view: view.prompt_tokens).replica


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
