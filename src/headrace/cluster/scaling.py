"""How many replicas there should be: who is started, who is stopped, and how long a start takes. Pure functions over
frozen views; the simulator and a live fleet ask the same ones.

    nobody --start--> starting ---- ColdStart.seconds ----> ready, works --idle for keep_alive_s--> stopped
                      process | read weights, copy them to the device | first step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from headrace.cluster.view import ReplicaView


@dataclass(frozen=True, slots=True)
class ColdStart:
    """From the decision to the first step. Weights are copied to the device while they are read, so the slower of the
    two ways counts. Every device of a replica reads its own share over its own link, all from one disk."""

    weight_bytes: float  # of the whole replica
    devices: int
    disk_bytes_per_s: float  # of the node: a local disk, or what a network store gives
    link_bytes_per_s: float  # host to one device
    process_s: float = 6.0  # scheduling, container, imports, contexts
    warm_s: float = 4.0  # memory for KV, kernels, first step

    @property
    def load_s(self) -> float:
        return self.weight_bytes / min(self.disk_bytes_per_s, self.devices * self.link_bytes_per_s)

    @property
    def seconds(self) -> float:
        return self.process_s + self.load_s + self.warm_s


@dataclass(frozen=True, slots=True)
class Scaling:
    """When to have more and when fewer."""

    requests: float  # that one replica should have at a time
    least: int = 0  # 0: scale to zero
    most: int = 1
    keep_alive_s: float = 60.0  # that a replica may idle before it is stopped

    def wanted(self, waiting: int, views: Sequence[ReplicaView]) -> int:
        """Replicas for those who wait and those who are served."""
        load = waiting + sum(view.requests for view in views)
        return min(self.most, max(self.least, ceil(load / self.requests)))

    def starts(self, waiting: int, views: Sequence[ReplicaView]) -> int:
        """How many to start now; those that are starting count already."""
        return max(0, self.wanted(waiting, views) - len(views))

    def stops(self, views: Sequence[ReplicaView]) -> tuple[int, ...]:
        """Whom to stop now: who idled for too long, longest first, but never below `least`."""
        spare = len(views) - self.least
        idle = [view for view in views if view.ready and not view.requests and view.idle_s >= self.keep_alive_s]
        idle.sort(key=lambda view: (-view.idle_s, view.replica))
        return tuple(view.replica for view in idle[: max(0, spare)])

    @property
    def fixed(self) -> bool:
        """Whether nobody is ever started or stopped."""
        return self.least == self.most
