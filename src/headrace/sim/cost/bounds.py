"""Closed forms that bound a system without simulating it: MoE-Lens for offloaded mixtures, the four numbers of
long-context serving, arithmetic intensity. Pure functions of published formulas, each with its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.shape import KV_BF16, KVFormat, ModelShape
from headrace.sim.hardware import Device, Link

# ----------------------------------------------------------------------- MoE-Lens (arXiv:2504.09345, section 5)


def memory_efficiency(prompt_tokens: int, output_tokens: int) -> float:
    """Parallelism-memory efficiency: tokens a request computes per KV token and step it holds, in its whole life.

    2 (p + g) / ((2 p + g) g), the paper's closed form; `exact_memory_efficiency` keeps the term it drops.
    """
    p, g = prompt_tokens, output_tokens
    return 2 * (p + g) / ((2 * p + g) * g)


def exact_memory_efficiency(prompt_tokens: int, output_tokens: int) -> float:
    """(p + g) / sum of (p + j) for j = 0..g: a request holds p + j tokens after j steps."""
    p, g = prompt_tokens, output_tokens
    return 2 * (p + g) / ((2 * p + g) * (g + 1))


@dataclass(frozen=True, slots=True)
class StreamedBound:
    """The most tokens per second of a model whose weights cross the host link once a step."""

    tokens_per_s: float
    bound: str  # "memory": KV space limits the batch; "compute": the device is saturated


def streamed_throughput(
    prompt_tokens: int, output_tokens: int, kv_tokens: float, sweep_s: float, device_tokens_per_s: float
) -> StreamedBound:
    """min(PME M / delta, T_GPU), with M = `kv_tokens` of KV and delta = `sweep_s`, one pass of all weights."""
    by_memory = memory_efficiency(prompt_tokens, output_tokens) * kv_tokens / sweep_s
    if by_memory < device_tokens_per_s:
        return StreamedBound(by_memory, "memory")
    return StreamedBound(device_tokens_per_s, "compute")


def saturating_tokens(shape: ModelShape, flops_per_s: float, link: Link) -> float:
    """Tokens per weight sweep that keep the device busy: (C / B) (experts / experts per token), for 2-byte weights."""
    sparsity = shape.experts / shape.experts_per_token if shape.experts else 1.0
    return flops_per_s / link.bytes_per_s * sparsity


# -------------------------------------------------------------------- long contexts (arXiv:2405.08944, section 2)


@dataclass(frozen=True, slots=True)
class LongContext:
    """What one request of a long context costs on one device at full peaks; the formulas are the paper's.

    `weights` is N, the parameter count the paper plugs in; the attention term L S^2 D counts one operation per pair
    and element, half of what a causal prefill does.
    """

    shape: ModelShape
    device: Device
    weights: float
    weight_bytes: float
    kv: KVFormat = KV_BF16

    def kv_bytes(self, tokens: int) -> float:
        return self.kv.bytes_per_token(self.shape) * tokens

    def prefill_s(self, tokens: int) -> float:
        """(2 N S + L S^2 D) / FLOPs per second."""
        flops = 2 * self.weights * tokens + self.shape.layers * tokens**2 * self.shape.hidden
        return flops / self.device.bf16_flops_per_s

    def decode_s(self, tokens: int, output_tokens: int) -> float:
        """Steps that each read all weights and the prompt's KV."""
        return output_tokens * (self.weight_bytes + self.kv_bytes(tokens)) / self.device.memory_bytes_per_s

    def switch_s(self, tokens: int, host_bytes_per_s: float) -> float:
        """One request's KV out to the host and another's in: 2 KV / bandwidth."""
        return 2 * self.kv_bytes(tokens) / host_bytes_per_s

    def users(self, tokens: int, memory_bytes: float) -> int:
        """Requests whose KV fits beside the weights."""
        return max(0, int((memory_bytes - self.weight_bytes) // self.kv_bytes(tokens)))
