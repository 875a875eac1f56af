"""How one counts: what an operator list contains, what share of a peak is reached, where activations lie.

`HEADRACE` is ours. `GENZ` and `LLM_VIEWER` count as those tools do, so that their published numbers come out and a
difference to ours is a difference of convention one can read here. A convention is a value; `analytic` applies it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from headrace.core.shape import ModelShape
from headrace.sim.cost.batch import windows_of
from headrace.sim.cost.operators import Attention, Dense, Distinct, Experts, expected_experts, most_experts
from headrace.sim.cost.placement import Placement

Operators = tuple[tuple[Dense, ...], tuple[Attention, ...]]
Overlap = Literal["serial", "network", "ideal"]


@dataclass(frozen=True, slots=True)
class Convention:
    """The knobs of the roofline. Shares multiply peaks; the defaults are ideal."""

    name: str
    operators: Callable[[Placement, Convention], Operators]
    compute_share: float = 1.0
    memory_share: float = 1.0
    network_share: float = 1.0
    layer_overhead_s: float = 0.0
    attained_shares: bool = False  # where a device's 8-bit products were measured, their share of the peak
    sum_bits: float = 0.0  # the residual stream and partial sums have at least so many, however narrow operands are
    distinct: Distinct = expected_experts
    onchip_bytes_per_s: float = float("inf")
    decode_on_chip: bool = False
    prefill_on_chip: bool = False
    scores_on_chip: bool = False
    idle_without_flops: bool = False
    # serial: terms follow each other; network: collectives hide behind the rest, or it behind them;
    # ideal: compute, memory and network all at once (NanoFlow's bound)
    overlap: Overlap = "serial"


def _rate(placement: Placement, convention: Convention, weight_bits: float) -> float:
    chip, operand_bits = placement.device, max(weight_bits, placement.formats.activation_bits)
    peak = chip.flops_per_s(weight_bits, placement.formats.activation_bits)
    if convention.attained_shares and operand_bits <= 8 and chip.eight_bit_share:
        return peak * chip.eight_bit_share
    return peak * convention.compute_share


def _wide_rate(placement: Placement, convention: Convention) -> float:
    """What is computed in 16 bits however narrow the weights are, and in 32 where the activations have 32."""
    bits = max(16.0, placement.formats.activation_bits)
    return placement.device.flops_per_s(bits, bits) * convention.compute_share


def _window_groups(shape: ModelShape) -> list[tuple[int | None, int]]:
    """(index into Batch.windowed, layers) for every distinct window; None is no window."""
    finite = windows_of(shape)
    counts = [(i, shape.windows.count(window)) for i, window in enumerate(finite)]
    full = shape.layers - sum(layers for _, layers in counts)
    return ([(None, full)] if full else []) + list(counts)


# ------------------------------------------------------------------------------------------------------------ ours


def headrace_operators(placement: Placement, convention: Convention) -> Operators:
    """Fused attention (scores never leave the chip, masked pairs are skipped), fused norms and activations."""
    dense = (*_projections(placement, convention), *_feed_forward(placement, convention), _head(placement, convention))
    return dense, tuple(
        operator
        for window, layers in _window_groups(placement.shape)
        for operator in _fused_attention(placement, convention, window, layers)
    )


def _projections(placement: Placement, convention: Convention) -> tuple[Dense, ...]:
    """q, k, v and o, and one pass for the two norms, the residual sums and the activation function."""
    shape, parallel, formats = placement.shape, placement.parallel, placement.formats
    act = formats.activation_bits / 8
    out = shape.heads * (shape.latent.value_dim if shape.latent else shape.head_dim)
    inward = placement.attention_weights - out * shape.hidden / parallel.attention
    rate = _rate(placement, convention, formats.weights.bits)
    wide = shape.ffn * max(1, shape.experts_per_token + shape.shared_experts)
    summed = max(act, convention.sum_bits / 8)
    passes = 8 * shape.hidden * summed / parallel.data + 3 * wide * summed / parallel.tensor
    width = shape.heads * shape.head_dim + shape.kv_width
    return (
        Dense(
            "qkv",
            shape.layers,
            rate,
            2 * inward / parallel.data,
            weight_bytes=inward * formats.weights.bytes_per_weight,
            token_bytes=(shape.hidden / parallel.data + width / parallel.tensor) * act,
        ),
        Dense(
            "out",
            shape.layers,
            rate,
            2 * out * shape.hidden / parallel.tensor,
            weight_bytes=out * shape.hidden / parallel.attention * formats.weights.bytes_per_weight,
            token_bytes=(shape.hidden / parallel.data + out / parallel.tensor) * act,
        ),
        Dense("elementwise", shape.layers, rate, 0.0, token_bytes=passes),
    )


def _feed_forward(placement: Placement, convention: Convention) -> tuple[Dense, ...]:
    shape, formats, ways = placement.shape, placement.formats, placement.parallel.tensor
    rate = _rate(placement, convention, formats.weights.bits)
    each, act = formats.weights.bytes_per_weight, formats.activation_bits / 8
    matrices = 3 if shape.gated else 2

    def block(name: str, count: int, width: int) -> Dense:
        weights = matrices * shape.hidden * width
        moved = (2 * shape.hidden + matrices * width / ways) * act
        stored = weights / placement.dense_ways * each
        return Dense(name, count, rate, 2 * weights / ways, weight_bytes=stored, token_bytes=moved)

    if not shape.experts:
        return (block("feed-forward", shape.layers, shape.ffn),)
    layers, one = shape.layers - shape.dense_layers, shape.expert_weights / ways
    routed = Experts(shape.experts, shape.experts_per_token, one * each, convention.distinct)
    moved = shape.experts_per_token * (2 * shape.hidden + matrices * shape.ffn) * act / ways
    router = shape.hidden * shape.experts
    return (
        Dense("experts", layers, rate, 2 * one * shape.experts_per_token, token_bytes=moved, experts=routed),
        Dense("router", layers, rate, 2 * router / ways, weight_bytes=router * 2),
        *([block("shared experts", layers, shape.ffn * shape.shared_experts)] if shape.shared_experts else []),
        *([block("feed-forward", shape.dense_layers, shape.dense_ffn)] if shape.dense_layers else []),
    )


def _head(placement: Placement, convention: Convention) -> Dense:
    shape, formats, ways = placement.shape, placement.formats, placement.parallel.tensor
    weights = shape.vocab * shape.hidden / ways
    act = formats.activation_bits / 8
    return Dense(
        "head",
        1,
        _rate(placement, convention, formats.head.bits) if formats.head else _wide_rate(placement, convention),
        2 * weights,
        weight_bytes=weights * formats.head_bytes,
        token_bytes=shape.hidden * act + 2 * shape.vocab * 4 / ways,
        sampled=True,
    )


def _fused_attention(
    placement: Placement, convention: Convention, window: int | None, layers: int
) -> tuple[Attention, ...]:
    """Scores and weighted sum in one kernel, in 16 bits or more whatever the KV is stored in.

    Latent attention decodes in the space of the cached vector, and expands the cached vectors for a prefill
    (DeepSeek-V2, section 2.1).
    """
    shape, parallel = placement.shape, placement.parallel
    rate = _wide_rate(placement, convention)
    bits = placement.formats.kv.bits
    reads = shape.kv_width * bits / 8 / placement.kv_shards / parallel.data
    value = shape.latent.value_dim if shape.latent else shape.head_dim
    moved = shape.heads * (shape.head_dim + value) * 2 / parallel.tensor + reads  # the new token's KV is written
    plain = 2 * shape.heads * (shape.head_dim + value) / parallel.tensor
    absorbed, expanding = plain, 0.0
    if shape.latent:
        absorbed = 2 * shape.heads * (2 * shape.latent.kv_rank + shape.latent.rope_dim) / parallel.tensor
        expanded = shape.heads * (shape.head_dim - shape.latent.rope_dim + value)
        expanding = 2 * shape.latent.kv_rank * expanded / parallel.tensor
    return (
        Attention("prefill attention", layers, False, rate, plain, expanding, reads, 0.0, moved, window),
        Attention("decode attention", layers, True, rate, absorbed, 0.0, reads, 0.0, moved, window),
    )


# ------------------------------------------------------------------------------------------------------------ GenZ


def genz_operators(placement: Placement, convention: Convention) -> Operators:
    """Fused qkv and gate-up products, logit and attend apart, no norms and no head; a prefill is a full square."""
    shape, ways, formats = placement.shape, placement.parallel.tensor, placement.formats
    act, rate = formats.activation_bits / 8, _rate(placement, convention, formats.weights.bits)
    q, kv = shape.heads * shape.head_dim / ways, 2 * shape.kv_heads * shape.head_dim / ways
    up = (2 if shape.gated else 1) * shape.ffn / ways

    def gemm(name: str, inner: float, outer: float) -> Dense:
        weight_bytes = inner * outer * formats.weights.bytes_per_weight
        return Dense(name, shape.layers, rate, 2 * inner * outer, weight_bytes, (inner + outer) * act)

    def wide(name: str, inner: float, outer: float) -> Dense:
        """The experts that wake, as one wide product: k inputs and outputs a token."""
        active, one = shape.experts_per_token, inner * outer * formats.weights.bytes_per_weight
        experts = Experts(shape.experts, active, one, convention.distinct)
        moved = active * (inner + outer) * act
        return Dense(name, shape.layers, rate, 2 * inner * outer * active, token_bytes=moved, experts=experts)

    product = wide if shape.experts else gemm
    router = gemm("router", shape.hidden, shape.experts) if shape.experts else None
    dense = (
        gemm("qkv", shape.hidden, q + kv),
        gemm("out", q, shape.hidden),
        *([_streaming(router)] if router else []),
        product("up", shape.hidden, up),
        product("down", shape.ffn / ways, shape.hidden),
    )
    half = kv / 2 * formats.kv.bits / 8
    parts = tuple(
        Attention(name, shape.layers, decode, rate, 2 * q, 0.0, half, shape.heads / ways * act, q * act, square=True)
        for decode in (False, True)
        for name in ("logit", "attend")
    )
    return dense, parts


def _streaming(router: Dense) -> Dense:
    """The router's product stays off chip even in a decode."""
    return Dense(
        router.name,
        router.count,
        router.flops_per_s,
        router.flops,
        router.weight_bytes,
        router.token_bytes,
        streams=True,
    )


# ------------------------------------------------------------------------------------------------------ LLM-Viewer


def llm_viewer_operators(placement: Placement, convention: Convention) -> Operators:
    """Every layer of the module graph by itself, activations through memory; the tool's quirks are kept.

    The head counts one operation a weight instead of two and its activations ignore the batch; the activation
    function works on `hidden` instead of `ffn` elements; a prefill's queries are read as if they had the key heads.
    """
    shape, formats = placement.shape, placement.formats
    h, f, act = shape.hidden, shape.ffn, formats.activation_bits / 8
    rate, bits = _viewer_rate(placement, convention), formats.weights.bytes_per_weight
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    stored = formats.kv.bits / 8

    def linear(name: str, inner: int, outer: int, out_bytes: float = act) -> Dense:
        moved = inner * act + outer * out_bytes
        return Dense(name, shape.layers, rate, 2 * inner * outer, inner * outer * bits, moved)

    def each(name: str, operations: float, elements: float) -> Dense:
        return Dense(name, shape.layers, rate, operations * h, token_bytes=elements * h * act)

    head = Dense(
        "lm_head", 1, rate, h * shape.vocab, h * shape.vocab * bits, 0.0, (h + shape.vocab) * act, sampled=True
    )
    dense = (
        linear("q_proj", h, q),
        linear("k_proj", h, kv, stored),
        linear("v_proj", h, kv, stored),
        linear("out_proj", q, h),
        linear("gate_proj", h, f),
        linear("up_proj", h, f),
        linear("down_proj", f, h),
        each("attn_norm", 7, 2),
        each("mlp_norm", 7, 2),
        each("attn_add", 1, 2),
        each("mlp_add", 1, 2),
        each("mlp_act", 2, 3),
        head,
    )

    def attention(name: str, decode: bool, flops: float, keys: float, scores: float, queries: float) -> Attention:
        pair_bytes = scores * shape.heads * act
        return Attention(
            name, shape.layers, decode, rate, flops, 0.0, keys * stored, pair_bytes, queries * act, square=True
        )

    return dense, tuple(
        operator
        for decode in (False, True)
        for operator in (
            attention("qk_matmul", decode, 2 * q, kv, 1, q if decode else kv),
            attention("sv_matmul", decode, 2 * q, kv, 1, q),
            attention("softmax", decode, 5 * shape.heads, 0, 2, 0),
        )
    )


def _viewer_rate(placement: Placement, convention: Convention) -> float:
    """The 8-bit peak when weights, activations and KV all have 8 bits or fewer, the 16-bit peak otherwise."""
    formats = placement.formats
    widest = max(formats.weights.bits, formats.activation_bits, formats.kv.bits)
    peak = placement.device.int8_flops_per_s if widest <= 8 else placement.device.bf16_flops_per_s
    return peak * convention.compute_share


HEADRACE = Convention(
    "headrace",
    headrace_operators,
    compute_share=0.83,  # the best matrix product NanoFlow measured on an A100: 1857 tok/s of a 70B model, 260 TFLOP/s
    memory_share=0.80,  # fleet-sim's profile builder
    network_share=0.70,  # APEX+'s all-reduce tables at 128 MiB: 0.73 of NVLink on 4 H100, 0.67 on 4 A100
    layer_overhead_s=3e-6,  # fleet-sim's profile builder
    attained_shares=True,
    sum_bits=16,
)
IDEAL = Convention("ideal", headrace_operators, sum_bits=16)  # every peak reached, nothing overlapped
# Peaks measured on the machine itself, which keeps all activations in its caches: no step is faster than this.
LIMIT = Convention(
    "limit", headrace_operators, sum_bits=16, decode_on_chip=True, prefill_on_chip=True, scores_on_chip=True
)
GENZ = Convention(
    "genz",
    genz_operators,
    compute_share=0.8,
    memory_share=0.8,
    distinct=most_experts,
    onchip_bytes_per_s=0.8 * 18000 * 2**30,
    decode_on_chip=True,
    scores_on_chip=True,
    idle_without_flops=True,
)
LLM_VIEWER = Convention("llm-viewer", llm_viewer_operators)
CONVENTIONS = {convention.name: convention for convention in (HEADRACE, IDEAL, GENZ, LLM_VIEWER)}
