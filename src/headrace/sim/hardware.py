"""Devices, links and how they are wired: numbers read from `data/devices.toml`, each with its source beside it.

Peaks are dense, GB is 1e9 bytes, a link's speed is one direction of one device. Nothing here knows about models.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from headrace.core.types import HeadraceError


class UnknownName(HeadraceError):
    """The catalogue has no entry of that name; the message lists the nearest ones."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that is not in a catalogue."""
    names = {candidate.lower(): candidate for candidate in known}
    near = [names[match] for match in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(names.values()))}."
    return UnknownName(f"There is no {kind} named {name!r}; {hint}")


@dataclass(frozen=True, slots=True)
class Link:
    """A point-to-point connection, one direction."""

    name: str
    bytes_per_s: float
    latency_s: float

    def transfer_s(self, nbytes: float) -> float:
        """Seconds to move `nbytes`, latency included."""
        return self.latency_s + nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU socket. A peak of 0 means the device has no such units."""

    name: str
    kind: str  # "gpu", "tpu" or "cpu"
    bf16_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    fp32_flops_per_s: float = 0.0
    fp8_flops_per_s: float = 0.0
    int8_flops_per_s: float = 0.0
    fp4_flops_per_s: float = 0.0
    eight_bit_share: float | None = None  # of the 8-bit peak, the best product anybody measured; None: nobody did
    max_w: float | None = None  # None: nobody published it
    idle_w: float | None = None  # None: 30 % of `max_w` (GenZ's static share)
    usd_per_hour: float | None = None
    fabric: Link | None = None  # to its peers in a node; None: they talk over `host`
    host: Link | None = None  # to the host's memory; None: it is the host
    sources: tuple[tuple[str, str], ...] = ()  # (field of the data file, source keys)
    confidence: str = ""

    @property
    def static_w(self) -> float:
        """Watts drawn whatever it does, 0 when its power is unknown."""
        return self.idle_w if self.idle_w is not None else 0.3 * (self.max_w or 0.0)

    def flops_per_s(self, weight_bits: float, activation_bits: float) -> float:
        """The fastest dense peak that multiplies operands of these sizes; units for wider numbers will do as well."""
        bits = max(weight_bits, activation_bits)
        peak = self.fp32_flops_per_s if self.fp32_flops_per_s or bits <= 16 else self.bf16_flops_per_s / 2
        if bits <= 16:
            peak = max(peak, self.bf16_flops_per_s)
        if bits <= 8:
            peak = max(peak, self.fp8_flops_per_s, self.int8_flops_per_s)
        if bits <= 4:
            peak = max(peak, self.fp4_flops_per_s)
        return peak

    @property
    def peer(self) -> Link:
        """The link to the next device of the same node."""
        return self.fabric or self.host or Link("memory", self.memory_bytes_per_s, 0.0)


@dataclass(frozen=True, slots=True)
class Topology:
    """Equal nodes of equal devices.

    node 0                 node 1
    d0 -peer- d1 ...       d0 -peer- d1 ...
          |______uplink______|          uplink: per device, node to node
    """

    device: Device
    devices_per_node: int
    nodes: int = 1
    uplink: Link | None = None  # needed when nodes > 1

    def __post_init__(self) -> None:
        if self.devices_per_node < 1 or self.nodes < 1:
            raise HeadraceError("A topology needs at least one node of at least one device.")
        if self.nodes > 1 and self.uplink is None:
            raise HeadraceError("Several nodes need an uplink; name one, such as 'ib-ndr'.")

    @property
    def devices(self) -> int:
        return self.devices_per_node * self.nodes

    def link(self, group: int, stride: int = 1) -> Link:
        """The slowest link in a ring of `group` devices that stand `stride` apart, devices numbered node by node."""
        inside = (group - 1) * stride < self.devices_per_node
        return self.device.peer if inside or self.uplink is None else self.uplink


_SCALES = {
    "bf16_tflops": ("bf16_flops_per_s", 1e12),
    "fp32_tflops": ("fp32_flops_per_s", 1e12),
    "fp8_tflops": ("fp8_flops_per_s", 1e12),
    "fp4_tflops": ("fp4_flops_per_s", 1e12),
    "int8_tops": ("int8_flops_per_s", 1e12),
    "eight_bit_share": ("eight_bit_share", 1.0),
    "memory_GB": ("memory_bytes", 1e9),
    "memory_GBps": ("memory_bytes_per_s", 1e9),
    "max_W": ("max_w", 1.0),
    "idle_W": ("idle_w", 1.0),
    "usd_h": ("usd_per_hour", 1.0),
}


@cache
def _catalogue() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("headrace.sim").joinpath("data/devices.toml").read_text("utf-8")
    return tomllib.loads(text)


def _device(name: str, entry: Mapping[str, Any]) -> Device:
    numbers = {_SCALES[key][0]: pair[0] * _SCALES[key][1] for key, pair in entry.items() if key in _SCALES}
    return Device(
        name=name,
        kind=entry["kind"],
        fabric=link(entry["fabric"]) if "fabric" in entry else None,
        host=link(entry["host"]) if "host" in entry else None,
        sources=tuple((key, pair[1]) for key, pair in entry.items() if key in _SCALES),
        confidence=entry["confidence"],
        **numbers,
    )


def _find(kind: str, table: str, name: str) -> tuple[str, Mapping[str, Any]]:
    entries = _catalogue()[table]
    for known, entry in entries.items():
        if known.lower() == name.lower():
            return known, entry
    raise unknown(kind, name, entries)


@cache
def device(name: str) -> Device:
    """The device of that name, in any case. Raises UnknownName listing the nearest names."""
    return _device(*_find("device", "devices", name))


@cache
def link(name: str) -> Link:
    """The link of that name, in any case. Raises UnknownName listing the nearest names."""
    known, entry = _find("link", "links", name)
    return Link(known, entry["GBps"][0] * 1e9, entry["latency_us"][0] * 1e-6)


def device_names() -> tuple[str, ...]:
    return tuple(_catalogue()["devices"])


def link_names() -> tuple[str, ...]:
    return tuple(_catalogue()["links"])


def source(key: str) -> str:
    """What a source key of the catalogue stands for."""
    sources: Mapping[str, str] = _catalogue()["sources"]
    return sources[key]
