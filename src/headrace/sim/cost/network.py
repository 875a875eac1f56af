"""Collectives on a ring: seconds as an affine function of bytes (GenZ's formulas). Owns no topology."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.types import HeadraceError
from headrace.sim.hardware import Link

RING_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
SETUP_S = 5e-6  # to start a collective, whatever its size (GenZ)


@dataclass(frozen=True, slots=True)
class Transfer:
    """fixed_s + nbytes * s_per_byte seconds; `moved` bytes cross each device's link for every byte of message."""

    fixed_s: float = 0.0
    s_per_byte: float = 0.0
    moved: float = 0.0

    def seconds(self, nbytes: float) -> float:
        return self.fixed_s + nbytes * self.s_per_byte


NOTHING = Transfer()


def collective(kind: str, devices: int, link: Link, setup_s: float = SETUP_S) -> Transfer:
    """One collective among `devices`, by the size of the whole message.

        all_reduce                              5 us + 2 (n-1) latency + 2 (n-1)/n bytes / bandwidth
        all_gather, reduce_scatter, all_to_all  5 us +   (n-1) latency +   (n-1)/n bytes / bandwidth

    For all_to_all the message is what one device sends to all. One device alone needs nothing.
    """
    if kind not in RING_PASSES:
        raise HeadraceError(f"There is no collective {kind!r}; known are {', '.join(RING_PASSES)}.")
    if devices <= 1:
        return NOTHING
    hops = RING_PASSES[kind] * (devices - 1)
    return Transfer(setup_s + hops * link.latency_s, hops / devices / link.bytes_per_s, hops / devices)


def exchange(devices: int, link: Link) -> Transfer:
    """An all-to-all whose messages are all under way at once, not passed on around a ring: it waits for one latency."""
    if devices <= 1:
        return NOTHING
    share = (devices - 1) / devices
    return Transfer(SETUP_S + link.latency_s, share / link.bytes_per_s, share)


def point_to_point(link: Link) -> Transfer:
    """One message to a neighbour: latency + bytes / bandwidth."""
    return Transfer(link.latency_s, 1 / link.bytes_per_s, 1.0)
