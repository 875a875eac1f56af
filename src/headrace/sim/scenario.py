"""A question for the simulator in settings, and what is simulated for it: model and hardware from the catalogue (or a
calibration) become a `Site`, traffic settings become arrivals. Values only; runs nothing.

A scenario is plain data, so it goes to other processes and machines as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from headrace.cluster.router import ROUTES, Route
from headrace.core.config import BadSetting, EngineSettings
from headrace.core.ports import Capacity
from headrace.core.shape import BF16, FP32, KV_BF16, KVFormat, ModelShape, WeightFormat
from headrace.engine import policy
from headrace.sim.calibration import load
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import CostModel, batch_of, windows_of
from headrace.sim.cost.conventions import CONVENTIONS, Convention
from headrace.sim.cost.copies import HostLink
from headrace.sim.cost.divided import Divided
from headrace.sim.cost.placement import BadPlacement, Formats, Parallel, Placement
from headrace.sim.drafts import parse_acceptance
from headrace.sim.executor import MOST_STEPS
from headrace.sim.hardware import Link, Topology, device, link
from headrace.sim.hfconfig import from_hf
from headrace.sim.models import model
from headrace.sim.run import Choose, Site
from headrace.sim.settings import SimulateSettings
from headrace.workload import streams
from headrace.workload.arrival import Arrival
from headrace.workload.settings import WorkloadSettings, mixture, parse_slo

MOST_CONFIG_BYTES = 1 << 20
WEIGHTS: Mapping[str, tuple[WeightFormat, int]] = {  # and the bits of the activations that meet them
    "bf16": (BF16, 16),
    "fp32": (FP32, 32),
    "fp8": (WeightFormat("fp8", 8), 8),
    "int8": (WeightFormat("int8", 8), 8),
    "int4": (WeightFormat("int4", 4, 128, 20), 16),  # weight-only: a 16-bit scale and a 4-bit zero point a group
}
KVS: Mapping[str, KVFormat] = {
    "bf16": KV_BF16,
    "fp32": KVFormat("fp32", 32),
    "fp8": KVFormat("fp8", 8),
    "int8": KVFormat("int8", 8),
    "int4": KVFormat("int4", 4),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One question: who is asked, how it schedules, what comes, how many times faster than the settings say, and by
    which part promises are tighter than they say."""

    simulate: SimulateSettings = field(default_factory=SimulateSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    traffic: tuple[WorkloadSettings, ...] = (WorkloadSettings(),)
    speed: float = 1.0
    margin: float = 0.0

    def arrivals(self) -> Iterator[Arrival]:
        """A fresh stream, the same every time. Raises BadSetting and, while it is read, BadTrace."""
        stream = mixture(self.traffic)
        stream = streams.promised(stream, 1 - self.margin) if self.margin else stream
        return stream if self.speed == 1.0 else streams.faster(stream, self.speed)

    @property
    def clients(self) -> int:
        return self.traffic[0].clients or 1

    @property
    def dispatch(self) -> Route:
        return ROUTES[self.simulate.dispatch]

    def site(self) -> Site:
        """Raises UnknownName, UnreadableConfig, BadPlacement, BadSetting, BadCalibration."""
        site = _calibrated(self, self.simulate.calibration) if self.simulate.calibration else _catalogued(self)
        seed, slo = self.traffic[0].seed, site.slo and site.slo.times(1 - self.margin)
        return replace(site, acceptance=parse_acceptance(self.simulate.draft_acceptance, seed), slo=slo)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str)

    @classmethod
    def from_json(cls, text: bytes) -> Scenario:
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))

    def rate(self) -> float:
        """Requests per second of the traffic as it is, from the first arrival to the last. Raises BadSetting."""
        first = last = None
        count = 0
        for arrival in self.arrivals():
            if arrival.at_s is None:
                raise BadSetting("a closed loop has no rate; give --arrivals with one, such as poisson:6")
            first = arrival.at_s if first is None else first
            last = arrival.at_s
            count += 1
        if first is None or last is None or last <= first:
            raise BadSetting("the traffic has no rate: it needs at least two requests at different times")
        return (count - 1) / (last - first)

    def faster(self, factor: float) -> Scenario:
        """The same requests so many times faster; the pauses of clients between turns shrink alike."""
        return replace(self, speed=self.speed * factor)


def placement(settings: SimulateSettings) -> Placement:
    """Where the model of the settings lies."""
    topology = parse_hardware(settings.hardware)
    if topology.devices % settings.pipeline:
        raise BadPlacement(f"{settings.pipeline} stages do not share {topology.devices} devices evenly.")
    parallel = Parallel(
        settings.tensor or topology.devices // settings.pipeline,
        settings.pipeline,
        settings.attention_copies,
        settings.spread_experts,
        settings.microbatches,
    )
    weights, activation_bits = WEIGHTS[settings.weights]
    formats = Formats(weights, KVS[settings.kv], activation_bits)
    return Placement(shape_of(settings.model), topology, parallel, formats)


def convention(settings: SimulateSettings) -> Convention:
    """The one that is named, with the shares that are set."""
    shares = {
        "compute_share": settings.compute_share,
        "memory_share": settings.bandwidth_share,
        "network_share": settings.network_share,
    }
    given: dict[str, Any] = {name: share for name, share in shares.items() if share is not None}
    if settings.compute_share is not None:
        given["attained_shares"] = False
    return replace(CONVENTIONS[settings.convention], **given)


def shape_of(name: str) -> ModelShape:
    """Of the catalogue, or of a config.json. Raises UnknownName or UnreadableConfig."""
    path = Path(name)
    if path.suffix != ".json" and not path.is_dir():
        return model(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise BadSetting(f"{path} is too large to be a model's config.json")
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadSetting(f"cannot read {path}: {error}") from error
    return from_hf(content)


_HARDWARE = re.compile(r"(?:(\d{1,4})x(?=\d+x))?(?:(\d{1,4})x)?([^@]+)(?:@([^@]+))?")


def parse_hardware(text: str) -> Topology:
    """'H100-SXM', '4xH100-SXM' or '2x8xH100-SXM@ib-ndr'. Raises BadSetting and UnknownName."""
    match = _HARDWARE.fullmatch(text.strip())
    if not match:
        raise BadSetting(f"hardware {text!r} is not NAME, 4xNAME or 2x8xNAME@LINK")
    nodes, devices, name, uplink = match.groups()
    if int(nodes or 1) > 1 and uplink is None:
        raise BadSetting(f"hardware {text!r} has several nodes; say what joins them, such as @ib-ndr (--list links)")
    return Topology(device(name), int(devices or 1), int(nodes or 1), link(uplink) if uplink else None)


def _catalogued(scenario: Scenario) -> Site:
    settings, engine = scenario.simulate, scenario.engine
    where = placement(settings)
    tokens = where.kv_tokens(settings.memory_use)
    blocks = tokens // engine.block_tokens
    if blocks < 1:
        raise BadPlacement(_too_small(where, settings))
    cost = Analytic(where, convention(settings), host_s=settings.host_ms / 1000)
    shape = where.shape
    steps = MOST_STEPS if settings.fast_forward else 1
    layers = shape.layers if settings.pipeline == 1 else 1  # stages take turns with whole steps
    context = min(shape.max_context_tokens, blocks * engine.block_tokens)
    host, host_blocks, least = _host_tier(where, engine, cost)
    return Site(
        engine,
        Capacity(blocks, engine.block_tokens, context, shape.vocab, steps, layers, host_blocks, least),
        cost,
        token_budget=step_tokens(engine, cost, windows_of(shape)),
        replicas=settings.replicas,
        windows=windows_of(shape),
        policies=_policies(settings, cost, windows_of(shape)),
        slo=parse_slo(scenario.traffic[0].slo),
        host=host,
    )


def _host_tier(where: Placement, engine: EngineSettings, cost: CostModel) -> tuple[HostLink | None, int, int]:
    """The way to the host's memory, the blocks there, and how many of them are worth a copy. Every device keeps its
    own part of a block there."""
    if not engine.host_kv_memory:
        return None, 0, 1
    chip, block_bytes = where.device, engine.block_tokens * where.kv_bytes_per_token
    road = chip.host or Link("memory", chip.memory_bytes_per_s / 2, 0.0)  # read and written again
    host = HostLink(road, block_bytes, launches=2 * where.stage_layers)
    blocks = int(engine.host_kv_memory // (block_bytes * where.parallel.devices / where.parallel.data))
    _, per_token_s = step_line(cost, windows_of(where.shape))
    return host, blocks, host.least_blocks(engine.block_tokens * per_token_s)


def _calibrated(scenario: Scenario, path: Path) -> Site:
    """The engine that was measured, under the settings that are asked about."""
    engine, calibration = scenario.engine, load(path)
    if engine.host_kv_memory:
        raise BadSetting("a calibration does not say what copies to the host cost; leave --host-kv-memory out")
    capacity, measured = calibration.capacity, calibration.settings
    if engine.block_tokens != capacity.block_tokens:
        raise BadSetting(f"{path} was measured with --block-tokens {capacity.block_tokens}; ask for the same")
    cost, budget = calibration.cost(strict=scenario.simulate.strict), engine.token_budget
    if budget is None and engine.inter_token_ms == measured.inter_token_ms:
        budget = calibration.token_budget
    return Site(
        engine,
        replace(capacity, steps=MOST_STEPS if scenario.simulate.fast_forward else 1, host_blocks=0),
        cost,
        token_budget=budget or step_tokens(engine, cost, ()),
        replicas=scenario.simulate.replicas,
        policies=_policies(scenario.simulate, cost, ()),
        slo=parse_slo(scenario.traffic[0].slo),
    )


def _policies(settings: SimulateSettings, cost: CostModel, windows: tuple[int, ...]) -> Choose:
    """What makes them for each replica."""
    if not settings.follow_steps:
        return partial(policy.choose, predict=Divided(cost).predict)
    price, most = step_line(cost, windows), policy.LANE_STEP_TOKENS
    return partial(policy.choose, predict=Divided(cost).predict, step_s=price, most_tokens=most)


def step_tokens(engine: EngineSettings, cost: CostModel, windows: tuple[int, ...]) -> int:
    """Tokens a step may compute: as asked, or what the price of a step allows within the inter-token target."""
    if engine.token_budget is not None:
        return engine.token_budget
    if engine.lanes != "one":
        return policy.LANE_STEP_TOKENS
    base_s, per_token_s = step_line(cost, windows)
    return policy.token_budget(engine.inter_token_ms / 1000, base_s, per_token_s, floor=policy.LEAST_STEP_TOKENS)


def step_line(cost: CostModel, windows: tuple[int, ...]) -> tuple[float, float]:
    """Seconds of a prefill step as a + b * tokens."""
    few, many = (cost.estimate(batch_of([(0, tokens)], 1, windows)).seconds for tokens in (2, 2048))
    per_token_s = (many - few) / 2046
    return few - 2 * per_token_s, per_token_s


def _too_small(where: Placement, settings: SimulateSettings) -> str:
    needed, there = where.weight_bytes / 1e9, settings.memory_use * where.device.memory_bytes / 1e9
    return (
        f"{settings.model} in {settings.weights} does not fit on {settings.hardware}: its weights take {needed:.1f} GB "
        f"of every device, and {there:.1f} GB may be used; take more devices, --weights fp8 or int4, or larger ones."
    )
