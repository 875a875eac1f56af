"""Throughput that others measured, predicted by the simulator: what an experiment is, and how it is simulated.

The numbers are in `data/published.toml`, each with its source. Nothing here is fitted to them: the engine, the policies
and the memory are those of a simulation, the price of a step is the HEADRACE roofline, and the host is free.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from random import Random
from statistics import median
from typing import Any

from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.core.shape import KVFormat, WeightFormat
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import windows_of
from headrace.sim.cost.conventions import HEADRACE, Convention, Operators, Overlap, headrace_operators
from headrace.sim.cost.placement import Formats, Parallel, Placement
from headrace.sim.executor import MOST_STEPS
from headrace.sim.hardware import Topology, device, link
from headrace.sim.models import model
from headrace.sim.run import Report, Site, simulate
from headrace.workload.arrival import Arrival, Stretch

CLOSE = 0.20  # a prediction within this is right
NODE = 8  # devices of one node
UPLINK = "ib-ndr"  # between nodes, per device
BLOCK_TOKENS = 16
SPARE = 1.05  # blocks beyond what a batch that is known to fit needs, for the watermark of admission
SEED = 1


@dataclass(frozen=True, slots=True)
class Experiment:
    """One published number and its setting; the fields are explained in the data file."""

    system: str
    source: str
    model: str
    device: str
    measured: str
    per: str
    published: float  # tokens per second
    batch: int
    lengths: tuple[tuple[int, int], ...]
    former: str
    formats: str
    tensor: int = 1
    requests: int | None = None  # None: one batch
    budget: int | None = None  # tokens of a step; None: all prompts of a batch at once
    rate: float | None = None
    admission: str = "free-blocks"
    overlap: Overlap = "serial"
    spread_experts: bool = False  # and the attention of every request on one device
    memory_share: float = 0.9
    fits: bool = False
    reason: str = ""

    @property
    def shares(self) -> float:
        """By how much the throughput of the replica was divided before it was published."""
        return {"replica": 1.0, "device": self.tensor, "node": self.tensor / NODE}[self.per]

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        shape = model(self.model)
        return shape.latent is None and shape.heads > shape.kv_heads

    @property
    def setting(self) -> str:
        lengths = " or ".join(f"{prompt}/{output}" for prompt, output in self.lengths)
        return f"{self.model} {self.formats}, {self.tensor} {self.device}, {lengths}, {self.batch} at once"


@dataclass(frozen=True, slots=True)
class Prediction:
    experiment: Experiment
    predicted: float  # tokens per second, as published

    @property
    def error(self) -> float:
        """Relative to what was published: positive is too fast."""
        return self.predicted / self.experiment.published - 1

    @property
    def close(self) -> bool:
        return abs(self.error) <= CLOSE


def _data() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("headrace.sim").joinpath("data/published.toml").read_text("utf-8"))


def experiments() -> Iterator[Experiment]:
    """All of them, in the order of the data file."""
    for group in _data()["group"]:
        shared = {key: value for key, value in group.items() if key not in ("columns", "rows")}
        for row in group["rows"]:
            fields = shared | dict(zip(group["columns"], row, strict=True))
            fields["lengths"] = tuple((prompt, output) for prompt, output in fields["lengths"])
            yield Experiment(**fields)


def formats(name: str) -> Formats:
    """The formats of that name in the data file."""
    entry = _data()["formats"][name]
    weights = WeightFormat(name, entry["weights"], entry.get("group", 0), entry.get("overhead", 0))
    head = weights if entry.get("head") else None
    return Formats(weights, KVFormat(name, entry["kv"]), entry["activations"], head)


def placement(experiment: Experiment) -> Placement:
    """One replica, on nodes of eight."""
    chip, devices, spread = device(experiment.device), experiment.tensor, experiment.spread_experts
    nodes = -(-devices // NODE)
    topology = Topology(chip, NODE, nodes, link(UPLINK) if nodes > 1 else None)
    parallel = Parallel(tensor=devices, data=devices if spread else 1, spread_experts=spread)
    return Placement(model(experiment.model), topology, parallel, formats(experiment.formats))


def predict(experiment: Experiment, convention: Convention = HEADRACE, host_s: float = 0.0) -> Prediction:
    """Simulate it; of several lengths, the best."""
    placed = placement(experiment)
    cost = Analytic(placed, replace(convention, overlap=experiment.overlap), host_s=host_s)
    found = [
        _throughput(experiment, simulate(_arrivals(experiment, *lengths), _site(experiment, cost, *lengths), seed=SEED))
        for lengths in experiment.lengths
    ]
    return Prediction(experiment, max(found) / experiment.shares)


def ungrouped(placed: Placement, convention: Convention) -> Operators:
    """Our operators, but decode attention reads the KV once for every query head, as kernels did that were made before
    query heads shared key heads."""
    dense, attention = headrace_operators(placed, convention)
    again = placed.shape.heads / placed.shape.kv_heads
    return dense, tuple(replace(op, context_bytes=op.context_bytes * again) if op.decode else op for op in attention)


UNGROUPED = replace(HEADRACE, name="ungrouped", operators=ungrouped)


def _arrivals(experiment: Experiment, prompt_tokens: int, output_tokens: int) -> Iterator[Arrival]:
    rng, at_s = Random(SEED), 0.0
    for _ in range(experiment.requests or experiment.batch):
        at_s += rng.expovariate(experiment.rate) if experiment.rate else 0.0
        yield Arrival(at_s, (Stretch(prompt_tokens),), output_tokens, max_new_tokens=output_tokens)


def _site(experiment: Experiment, cost: Analytic, prompt_tokens: int, output_tokens: int) -> Site:
    longest, batch = prompt_tokens + output_tokens, experiment.batch
    if experiment.fits or batch == 1:
        blocks = int(SPARE * batch * (longest // BLOCK_TOKENS + 1)) + 1
    else:
        blocks = cost.placement.kv_tokens(experiment.memory_share) // BLOCK_TOKENS
    shape = cost.placement.shape
    settings = EngineSettings(
        block_tokens=BLOCK_TOKENS,
        max_running=batch,
        max_queue_requests=1 << 30,
        max_queue_tokens=1 << 40,
        prefix_cache=False,
        admission=experiment.admission,
        batch=experiment.former,
    )
    capacity = Capacity(blocks, BLOCK_TOKENS, longest, shape.vocab, MOST_STEPS)
    budget = experiment.budget or batch * prompt_tokens
    return Site(settings, capacity, cost, budget, windows=windows_of(shape))


def _throughput(experiment: Experiment, report: Report) -> float:
    """Tokens per second of the replica, of the kind that was published."""
    totals = report.totals
    if experiment.measured in ("decode", "user"):
        mean_s = totals.tpot_s.mean
        assert mean_s is not None, "nobody drew a second token"
        return (experiment.batch if experiment.measured == "decode" else 1) / mean_s
    tokens = {
        "output": totals.output_tokens,
        "prompt": totals.prompt_tokens,
        "total": totals.prompt_tokens + totals.output_tokens,
    }[experiment.measured]
    return tokens / totals.span_s


@dataclass(frozen=True, slots=True)
class System:
    """All predictions of one system. It counts as predicted when the median of its errors is close."""

    name: str
    predictions: tuple[Prediction, ...]

    @property
    def close(self) -> int:
        return sum(prediction.close for prediction in self.predictions)

    @property
    def median_error(self) -> float:
        """Of the absolute errors."""
        return median(abs(prediction.error) for prediction in self.predictions)

    @property
    def predicted(self) -> bool:
        return self.median_error <= CLOSE


def by_system(predictions: Iterable[Prediction]) -> tuple[System, ...]:
    """In the order of their first prediction."""
    systems: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        systems.setdefault(prediction.experiment.system, []).append(prediction)
    return tuple(System(name, tuple(some)) for name, some in systems.items())
