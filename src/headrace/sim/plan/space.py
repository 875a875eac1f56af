"""The space of plans: every way to lie a model on a pool of devices, with what memory alone says about each.

A plan is a `SimulateSettings`: copies of the model x pipeline stages x devices that share a layer, with copies of the
attention inside, whole or cut experts, and formats (APEX's space). All degrees are divisors, and a replica never
straddles half a node.

    pool    | node 0: d d d d d d d d | node 1: d d d d d d d d |
    plan    [  replica 0  ][ replica 1 ] [ replica 2 ][ replica 3 ]      tensor 2 x pipeline 2, four replicas
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from headrace.core.config import EngineSettings
from headrace.core.shape import ModelShape
from headrace.sim.cost.placement import BadPlacement, Placement
from headrace.sim.hardware import Device, Topology
from headrace.sim.scenario import WEIGHTS, placement, shape_of
from headrace.sim.settings import SimulateSettings


@dataclass(frozen=True, slots=True)
class Pool:
    """Devices one may use, what one costs an hour, and how they are wired."""

    topology: Topology
    usd_per_hour: float | None  # of one device; None: nobody said

    @property
    def name(self) -> str:
        return self.topology.device.name

    def hardware(self, devices: int) -> str | None:
        """One replica of so many devices as a hardware setting; None where it would straddle half a node."""
        inside = self.topology.devices_per_node
        if devices <= inside:
            return f"{devices}x{self.name}" if devices > 1 else self.name
        uplink = self.topology.uplink
        whole = devices % inside == 0 and uplink is not None
        return f"{devices // inside}x{inside}x{self.name}@{uplink.name}" if whole and uplink else None

    def replicas(self, devices: int) -> int:
        """How many replicas of so many devices there is room for."""
        inside = self.topology.devices_per_node
        if devices <= inside:
            return inside // devices * self.topology.nodes
        return self.topology.nodes // (devices // inside)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to do it: what `headrace simulate` would be told, and what it takes."""

    simulate: SimulateSettings
    devices: int  # of one replica
    usd_per_hour: float | None  # of one device

    @property
    def all_devices(self) -> int:
        return self.devices * self.simulate.replicas

    @property
    def cost(self) -> float | None:
        """US dollars an hour."""
        return None if self.usd_per_hour is None else self.all_devices * self.usd_per_hour

    def of(self, replicas: int) -> Plan:
        return replace(self, simulate=replace(self.simulate, replicas=replicas))

    @property
    def layout(self) -> str:
        """'4 x (TP2, PP2)' and what else is not as usual."""
        one = self.simulate
        cut = [f"TP{one.tensor}"] if (one.tensor or 1) > 1 else []
        cut += [f"PP{one.pipeline}" + (f"/{one.microbatches}" if one.microbatches > 1 else "")] * (one.pipeline > 1)
        cut += [f"attention DP{one.attention_copies}"] * (one.attention_copies > 1)
        cut += ["EP"] * one.spread_experts
        return f"{one.replicas} x ({', '.join(cut) or 'one device'})"

    @property
    def formats(self) -> str:
        one = self.simulate
        return one.weights if one.kv == "bf16" else f"{one.weights}, {one.kv} KV"


@dataclass(frozen=True, slots=True)
class Refused:
    """A plan that needs no simulation to be turned down, and why."""

    plan: Plan
    kind: str  # a few words under which many of them are counted
    reason: str


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def sizes(pool: Pool) -> list[int]:
    """Devices a replica may have."""
    inside, nodes = pool.topology.devices_per_node, pool.topology.nodes
    return sorted({*divisors(inside), *(inside * count for count in divisors(nodes))})


def plans(pool: Pool, usual: SimulateSettings, formats: Sequence[tuple[str, str]]) -> Iterator[Plan]:
    """Every plan of the pool with as many replicas as there is room for; `usual` says all that is not searched."""
    shape = shape_of(usual.model)
    for devices, (weights, kv) in product(sizes(pool), formats):
        hardware, room = pool.hardware(devices), pool.replicas(devices)
        if hardware is None or not room:
            continue
        for tensor, pipeline, copies, spread, parts in cuts(shape, devices):
            settings = replace(
                usual,
                hardware=hardware,
                replicas=room,
                tensor=tensor,
                pipeline=pipeline,
                attention_copies=copies,
                spread_experts=spread,
                microbatches=parts,
                weights=weights,
                kv=kv,
            )
            yield Plan(settings, devices, pool.usd_per_hour)


def cuts(shape: ModelShape, devices: int) -> Iterator[tuple[int, int, int, bool, int]]:
    """(tensor, stages, attention copies, whether experts lie whole, parts of a step) of one replica."""
    for pipeline in divisors(devices):
        tensor = devices // pipeline
        for copies in divisors(tensor):
            for spread in (False, True) if shape.experts and copies > 1 else (False,):
                for parts in sorted({1, pipeline}):
                    yield tensor, pipeline, copies, spread, parts


def refused(plan: Plan, longest: int) -> Refused | None:
    """What shapes, formats and memory say; `longest` is the longest request there will be."""
    settings = plan.simulate
    try:
        where = placement(settings)
    except BadPlacement as error:
        return Refused(plan, "cannot be cut so", str(error))
    if reason := _unit_missing(where.device, settings.weights):
        return Refused(plan, "no units for the format", reason)
    tokens = where.kv_tokens(settings.memory_use)
    usable = settings.memory_use * where.device.memory_bytes / 1e9
    if tokens < EngineSettings().block_tokens:
        needed = f"{where.weight_bytes / 1e9:.1f} GB of weights a device, {usable:.1f} GB may be used"
        return Refused(plan, "weights do not fit", needed)
    if tokens // where.parallel.data < min(longest, where.shape.max_context_tokens):
        left = f"KV for {tokens // where.parallel.data:,} tokens is left, the longest request has {longest:,}"
        return Refused(plan, "too little KV memory", left)
    return None


def _unit_missing(chip: Device, weights: str) -> str:
    """Eight bits are worth choosing only where something multiplies them."""
    _, bits = WEIGHTS[weights]
    if bits == 8 and not (chip.fp8_flops_per_s if weights == "fp8" else chip.int8_flops_per_s):
        return f"{chip.name} does not multiply {weights}"
    return ""


def memory(plan: Plan) -> tuple[float, int]:
    """(bytes of weights on the fullest device, tokens of KV of all replicas)."""
    where: Placement = placement(plan.simulate)
    return where.weight_bytes, where.kv_tokens(plan.simulate.memory_use) * plan.simulate.replicas
