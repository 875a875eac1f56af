"""What a step takes at least on a device whose peaks were measured: the cost model with every peak reached.

    limit = sum over operators of max(operations / fastest multiplying, bytes of weights and KV / fastest reading)

Activations stay in caches and cost nothing, nor does whatever is no operator. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from headrace.core.shape import KVFormat, ModelShape, WeightFormat
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, batch_of, windows_of
from headrace.sim.cost.conventions import LIMIT
from headrace.sim.cost.placement import Formats, Placement
from headrace.sim.hardware import Device, Topology

ATTENTION, HEAD, LAYERS = "attention", "head and sampling", "layers"
_ARITHMETIC_BITS = {"fp32": 32.0, "bf16": 16.0}  # what activations have beside such weights; 8 beside narrower ones


@dataclass(frozen=True, slots=True)
class Limit:
    """The least seconds of a step."""

    rows: int  # requests that decode; of a prefill, 1
    context: int  # tokens in the KV of each before the step
    tokens: int  # computed in the step
    seconds: float
    bound: str  # "compute" or "memory": what most of them go to
    parts: Mapping[str, float]  # seconds by part of the step

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Stored:
    """A loaded model's numbers: what it is and how many bits it takes, whatever mixture of formats it lies in."""

    weights: str  # name of the format
    weight_bytes: float  # that a step reads: those of the layers and the head
    kv: str
    kv_bytes_per_token: float

    def formats(self, shape: ModelShape) -> Formats:
        """Mean formats of these bytes."""
        bits = 8 * self.weight_bytes / (shape.layer_weights + shape.vocab * shape.hidden)
        weights = WeightFormat(self.weights, bits)
        kv = KVFormat(self.kv, 8 * self.kv_bytes_per_token / (shape.layers * shape.kv_width))
        return Formats(weights, kv, _ARITHMETIC_BITS.get(self.weights, 8.0), head=weights)


def machine(name: str, memory_bytes: float, bytes_per_s: float, flops_per_s: Mapping[str, float]) -> Device:
    """A device with peaks by precision: fp32, bf16, int8."""
    return Device(
        name=name,
        kind="cpu",
        bf16_flops_per_s=flops_per_s["bf16"],
        memory_bytes=memory_bytes,
        memory_bytes_per_s=bytes_per_s,
        fp32_flops_per_s=flops_per_s["fp32"],
        int8_flops_per_s=flops_per_s["int8"],
    )


class Limits:
    """Limits of the steps of one model on one device."""

    def __init__(self, shape: ModelShape, device: Device, stored: Stored) -> None:
        self._cost = Analytic(Placement(shape, Topology(device, 1), formats=stored.formats(shape)), LIMIT)
        self._windows = windows_of(shape)

    def decode(self, rows: int, context: int) -> Limit:
        """So many requests compute one token each, and sample."""
        return self._limit(rows, context, batch_of([(context, 1)] * rows, rows, self._windows))

    def prefill(self, tokens: int) -> Limit:
        """One request computes its whole prompt, and samples."""
        return self._limit(1, 0, batch_of([(0, tokens)], 1, self._windows))

    def _limit(self, rows: int, context: int, batch: Batch) -> Limit:
        price = self._cost.estimate(batch)
        parts = dict.fromkeys((LAYERS, ATTENTION, HEAD), 0.0)
        for name, count, demand in self._cost.operators(batch):
            parts[_part(name)] += count * demand.seconds
        return Limit(rows, context, int(batch.tokens), price.seconds, price.bound, parts)


def _part(operator: str) -> str:
    return ATTENTION if operator.endswith("attention") else HEAD if operator == "head" else LAYERS


def grid(rows: Iterable[int], contexts: Iterable[int]) -> list[tuple[int, int]]:
    """(rows, context) of every step that is asked about."""
    contexts = sorted(set(contexts))
    return [(count, context) for context in contexts for count in sorted(set(rows))]
