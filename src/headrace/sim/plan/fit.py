"""Does a model fit, what is left for its requests, and how fast would it be? Every number with its formula.

Memory follows from the shapes alone; speeds are those of the simulator's cost model. Decides nothing.

    device memory  [ weights | KV of requests ................ | not used: activations, workspace ]
                   '------------- memory_use ------------------'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headrace.core.config import EngineSettings, format_bytes
from headrace.core.shape import ModelShape
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, StepCost, batch_of, windows_of
from headrace.sim.cost.bounds import LongContext, StreamedBound, streamed_throughput
from headrace.sim.cost.placement import BadPlacement, Placement
from headrace.sim.hardware import device, device_names
from headrace.sim.plan.settings import FitSettings
from headrace.sim.scenario import WEIGHTS, convention, placement, step_tokens
from headrace.sim.settings import SimulateSettings

CONTEXTS = (4096, 32_768, 131_072)  # for which the limits of long contexts are told


@dataclass(frozen=True, slots=True)
class Number:
    """One answer: its value, how people read it, and how it comes about."""

    name: str
    value: float
    unit: str
    shown: str
    formula: str
    worked: str  # the formula with its numbers
    known: str  # "shape": follows from the model; "catalogue": from a data sheet; "assumed": from our shares of peaks


@dataclass(frozen=True, slots=True)
class Speed:
    """What so many requests side by side get, all at the middle of their answers."""

    requests: int
    token_s: float  # one decode step: time per token of each of them
    tokens_per_s: float  # while all decode
    served_per_s: float  # output tokens, when the prompts of those that follow are computed in between
    bound: str  # "compute", "memory", "network" or "overhead"
    joules_per_token: float


@dataclass(frozen=True, slots=True)
class Long:
    """Limits of one context length at full peaks (arXiv:2405.08944)."""

    tokens: int
    users: int
    prefill_s: float
    decode_s: float  # per token of one user
    switch_s: float | None  # KV out to the host and another one's in; None: there is no host link


@dataclass(frozen=True, slots=True)
class Swing:
    """What becomes of an answer when something that it rests on is 10 % less."""

    of: str
    served: float  # output tokens per second of the largest batch, relative to the answer


@dataclass(frozen=True, slots=True)
class Fit:
    """All that was asked about a model on one replica."""

    subject: str
    numbers: tuple[Number, ...]
    speeds: tuple[Speed, ...]
    long: tuple[Long, ...]
    streamed: StreamedBound | None  # if its weights stayed in the host's memory; None: there is no host link
    swings: tuple[Swing, ...]
    notes: tuple[str, ...]


def fit(model: str, asked: FitSettings) -> Fit:
    """Raises BadPlacement with what would fit instead, UnknownName, UnreadableConfig or BadSetting."""
    simulate = SimulateSettings(
        model=model,
        hardware=asked.device,
        tensor=asked.tensor,
        pipeline=asked.pipeline,
        weights=asked.weights,
        kv=asked.kv,
        memory_use=asked.memory_use,
        host_ms=asked.host_ms,
    )
    where = placement(simulate)
    if where.kv_tokens(asked.memory_use) < EngineSettings().block_tokens:
        raise BadPlacement(_instead(model, asked, where))
    cost = Analytic(where, convention(simulate), host_s=asked.host_ms / 1000)
    budget = step_tokens(EngineSettings(), cost, windows_of(where.shape))
    numbers = (*_weights(where), *_kv(where, asked), _activations(where, budget, asked))
    most = max(1, concurrent(where, asked))
    sizes = sorted({size for size in asked.sizes if size <= most} | {most})
    speeds = tuple(speed(where, cost, asked, size) for size in sizes)
    return Fit(
        f"{model} in {asked.weights} on {asked.device}",
        numbers,
        speeds,
        tuple(_long(where, asked)),
        _streamed(where, asked),
        tuple(_swings(where, simulate, asked, most)),
        tuple(_notes(numbers, where, asked)),
    )


def concurrent(where: Placement, asked: FitSettings) -> int:
    """Requests that fit with all their tokens."""
    return where.kv_tokens(asked.memory_use) // (asked.prompt_tokens + asked.output_tokens)


def speed(where: Placement, cost: Analytic, asked: FitSettings, requests: int) -> Speed:
    """With N requests side by side each takes N prefills' and its own share of steps' time:
    served = N output / (N prefill + output step)."""
    step, prompt = cost.estimate(decoding(where, asked, requests)), prefill(where, cost, asked.prompt_tokens)
    span_s = requests * prompt.seconds + asked.output_tokens * step.seconds
    joules = prompt.joules / asked.output_tokens + step.joules / requests
    served = requests * asked.output_tokens / span_s
    return Speed(requests, step.seconds, requests / step.seconds, served, step.bound, joules)


def decoding(where: Placement, asked: FitSettings, requests: int) -> Batch:
    """A decode step of requests that are halfway through their answers."""
    return batch_of([(asked.prompt_tokens + asked.output_tokens // 2, 1)] * requests, requests, windows_of(where.shape))


def prefill(where: Placement, cost: Analytic, tokens: int) -> StepCost:
    """One prompt by itself."""
    return cost.estimate(batch_of([(0, tokens)], 1, windows_of(where.shape)))


# -- memory ------------------------------------------------------------------------------------------------------------


def _weights(where: Placement) -> Iterator[Number]:
    shape, formats, parallel = where.shape, where.formats, where.parallel
    tables = 1 if shape.tied_embedding else 2
    billions, each = shape.weights / 1e9, formats.weights.bytes_per_weight
    yield Number(
        "parameters",
        shape.weights,
        "",
        f"{billions:.2f} B" + (f", {shape.active_weights / 1e9:.2f} B active" if shape.experts else ""),
        "all layers (attention + feed-forward) + vocabulary x hidden x tables",
        f"{shape.layers} layers: {shape.layer_weights:,} + {shape.vocab:,} x {shape.hidden:,} x {tables}",
        "shape",
    )
    yield Number(
        "weights",
        where.weight_bytes,
        "bytes a device",
        f"{where.weight_bytes / 1e9:.2f} GB a device",
        "(layers of the fullest stage x bytes + tables x 16 bits) / devices that share them",
        f"{where.layer_weights:,.0f} x {each:g} B + tables, over {parallel.tensor} (tensor) x {parallel.pipeline} "
        f"(pipeline)",
        "shape",
    )


def _kv(where: Placement, asked: FitSettings) -> Iterator[Number]:
    shape, kv, chip = where.shape, where.formats.kv, where.device
    each, tokens = kv.bytes_per_token(shape), where.kv_tokens(asked.memory_use)
    free = asked.memory_use * chip.memory_bytes - where.weight_bytes
    width = _kv_width(shape)
    yield Number(
        "KV per token",
        each,
        "bytes",
        format_bytes(each),
        f"{width[0]} x layers x bytes",
        f"{width[1]} x {shape.layers} x {kv.bits / 8:g}",
        "shape",
    )
    yield Number(
        "KV memory",
        tokens,
        "tokens",
        f"{tokens:,} tokens",
        "(use x device memory - weights) / KV per token on a device x attention copies",
        f"({asked.memory_use:g} x {chip.memory_bytes / 1e9:g} - {where.weight_bytes / 1e9:.2f} = {free / 1e9:.2f} GB) "
        f"/ {where.kv_bytes_per_token:,.0f} B x {where.parallel.data}",
        "catalogue",
    )
    largest = min(tokens // where.parallel.data, shape.max_context_tokens)
    yield Number(
        "largest context",
        largest,
        "tokens",
        f"{largest:,} tokens",
        "the smaller of what the model was trained for and what the KV memory holds",
        f"min({shape.max_context_tokens:,}, {tokens // where.parallel.data:,})",
        "catalogue",
    )
    fitting = concurrent(where, asked)
    yield Number(
        "requests side by side",
        fitting,
        "requests",
        f"{fitting:,} of {asked.prompt_tokens:,} + {asked.output_tokens:,} tokens",
        "KV memory / (prompt + answer), so that none is ever put off",
        f"{tokens:,} / ({asked.prompt_tokens:,} + {asked.output_tokens:,})",
        "catalogue",
    )


def _kv_width(shape: ModelShape) -> tuple[str, str]:
    if shape.latent:
        return "(latent vector + rotary key)", f"({shape.latent.kv_rank} + {shape.latent.rope_dim})"
    return "2 x KV heads x head size", f"2 x {shape.kv_heads} x {shape.head_dim}"


def _activations(where: Placement, budget: int, asked: FitSettings) -> Number:
    """An estimate: a step's widest tensors in 16 bits, and the logits of all that run in 32."""
    shape, parallel = where.shape, where.parallel
    ffn = shape.ffn * max(1, shape.experts_per_token)
    queries = (shape.heads * shape.head_dim + shape.kv_width) // parallel.attention
    widest = 2 * shape.hidden + max(2 * ffn // parallel.tensor, queries)
    rows = EngineSettings().max_running
    nbytes = budget * widest * 2 + rows * shape.vocab * 4 / parallel.tensor
    return Number(
        "activations",
        nbytes,
        "bytes a device",
        f"{nbytes / 1e9:.2f} GB a device",
        "tokens a step x (2 hidden + widest of feed-forward and attention) x 2 B + rows x vocabulary x 4 B",
        f"{budget:,} x {widest:,} x 2 B + {rows} x {shape.vocab:,} x 4 B / {parallel.tensor}",
        "assumed",
    )


def _notes(numbers: tuple[Number, ...], where: Placement, asked: FitSettings) -> Iterator[str]:
    found = {number.name: number for number in numbers}
    spare = (1 - asked.memory_use) * where.device.memory_bytes
    if found["activations"].value > spare:
        yield (
            f"activations of {found['activations'].shown} do not fit into the {spare / 1e9:.1f} GB that are left over: "
            f"lower --memory-use, or serve with a smaller --token-budget"
        )
    if not found["requests side by side"].value:
        yield "not one whole request of that length fits; the speeds are those of one that is alone"


# -- limits, and how sure they are -------------------------------------------------------------------------------------


def _long(where: Placement, asked: FitSettings) -> Iterator[Long]:
    """Of one device's share of the model, so that any number of devices has the same formulas."""
    shape, ways = where.shape, where.parallel.devices
    chip = replace(
        where.device,
        bf16_flops_per_s=where.device.bf16_flops_per_s * ways,
        memory_bytes_per_s=where.device.memory_bytes_per_s * ways,
    )
    read = min(1.0, shape.active_weights / shape.weights) if shape.experts else 1.0  # of a mixture, by one user's token
    paper = LongContext(shape, chip, shape.active_weights, read * where.weight_bytes * ways, where.formats.kv)
    host = where.device.host
    for tokens in (*(size for size in CONTEXTS if size < shape.max_context_tokens), shape.max_context_tokens):
        users = where.kv_tokens(asked.memory_use) // tokens
        switch_s = None if host is None else paper.switch_s(tokens, host.bytes_per_s * ways)
        yield Long(tokens, users, paper.prefill_s(tokens), paper.decode_s(tokens, 1), switch_s)


def _streamed(where: Placement, asked: FitSettings) -> StreamedBound | None:
    """MoE-Lens: weights cross the host link once a step, and all of the device's memory is KV."""
    host = where.device.host
    if host is None:
        return None
    ways, shape = where.parallel.devices, where.shape
    kv_tokens = asked.memory_use * where.device.memory_bytes / where.kv_bytes_per_token
    sweep_s = where.weight_bytes / host.bytes_per_s
    saturated = where.device.bf16_flops_per_s * ways / (2 * shape.active_weights)
    return streamed_throughput(asked.prompt_tokens, asked.output_tokens, kv_tokens, sweep_s, saturated)


def _swings(where: Placement, simulate: SimulateSettings, asked: FitSettings, most: int) -> Iterator[Swing]:
    """The largest batch again, with one thing at a time 10 % worse."""
    chip, host_s = where.device, asked.host_ms / 1000
    base = speed(where, Analytic(where, convention(simulate), host_s=host_s), asked, most).served_per_s
    peaks = ("bf16_flops_per_s", "fp32_flops_per_s", "fp8_flops_per_s", "int8_flops_per_s", "fp4_flops_per_s")
    slower = {
        "memory bandwidth": replace(chip, memory_bytes_per_s=0.9 * chip.memory_bytes_per_s),
        "arithmetic": replace(chip, **{name: 0.9 * getattr(chip, name) for name in peaks}),
    }
    for name, worse in slower.items():
        there = replace(where, topology=replace(where.topology, device=worse))
        cost = Analytic(there, convention(simulate), host_s=host_s)
        yield Swing(f"{name} 10 % less", speed(there, cost, asked, most).served_per_s / base)
    cost = Analytic(where, convention(simulate), host_s=1.1 * host_s)
    yield Swing("host time 10 % more", speed(where, cost, asked, most).served_per_s / base)
    tight = replace(asked, memory_use=0.9 * asked.memory_use)
    less = max(1, concurrent(where, tight))
    cost = Analytic(where, convention(simulate), host_s=host_s)
    yield Swing("usable memory 10 % less", speed(where, cost, asked, less).served_per_s / base)


# -- what would fit instead --------------------------------------------------------------------------------------------


def _instead(model: str, asked: FitSettings, where: Placement) -> str:
    there = asked.memory_use * where.device.memory_bytes / 1e9
    ways = "; or ".join(alternatives(asked, where)) or "nothing in the catalogue: give more stages with --pipeline"
    return (
        f"{model} in {asked.weights} does not fit on {asked.device}: its weights take {where.weight_bytes / 1e9:.1f} "
        f"GB of every device, and {there:.1f} GB may be used. What would fit: {ways}."
    )


def alternatives(asked: FitSettings, where: Placement) -> Iterator[str]:
    """Fewer bits here, more devices of this kind, or one device that is large enough."""
    for name in ("fp8", "int4"):
        weights, bits = WEIGHTS[name]
        formats = replace(where.formats, weights=weights, activation_bits=bits)
        if weights.bits < where.formats.weights.bits and _fits(replace(where, formats=formats), asked):
            yield f"--weights {name}"
            break
    for count in (2, 4, 8, 16, 32, 64):
        larger = _on(where, count)
        if larger is not None and count > where.parallel.devices and _fits(larger, asked):
            yield f"--device {count}x{where.device.name}"
            break
    single = sorted(device_names(), key=lambda name: device(name).memory_bytes)
    alone = _on(where, 1)
    for name in single if alone else ():
        assert alone is not None
        chip = device(name)
        there = replace(alone, topology=replace(alone.topology, device=chip))
        if chip.kind != "cpu" and _fits(there, asked):
            yield f"--device {name} ({chip.memory_bytes / 1e9:.0f} GB)"
            break


def _on(where: Placement, count: int) -> Placement | None:
    parallel = replace(where.parallel, tensor=count, pipeline=1, data=1, spread_experts=False)
    try:
        return replace(where, topology=replace(where.topology, devices_per_node=count, nodes=1), parallel=parallel)
    except BadPlacement:
        return None


def _fits(where: Placement, asked: FitSettings) -> bool:
    """With at least one request of the usual length."""
    return where.kv_tokens(asked.memory_use) >= asked.prompt_tokens + asked.output_tokens
