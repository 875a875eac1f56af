"""Operators of a transformer as demands on a device: FLOPs, and bytes by where they lie. Prices no network.

Two kinds are enough. `Dense` work follows the number of tokens (or of sampled rows) and reads its weights once a step;
`Attention` follows pairs of queries and keys and reads the KV. All numbers are of one device, per token of the replica.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pow


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory of a device as an operator sees it: effective bytes a second, and what never leaves the chip."""

    bytes_per_s: float
    onchip_bytes_per_s: float = float("inf")
    decode_on_chip: bool = False  # activations of a step that only decodes stay on chip (GenZ)
    prefill_on_chip: bool = False  # and so do those of any other step
    scores_on_chip: bool = False  # attention scores stay on chip
    idle_without_flops: bool = False  # an operator without FLOPs is free (GenZ)

    def keeps(self, decode: bool) -> bool:
        """Whether activations of such a step never leave the chip."""
        return self.decode_on_chip if decode else self.prefill_on_chip


@dataclass(frozen=True, slots=True)
class Demand:
    """What one operator asks of one device. It takes as long as the slower of the two."""

    compute_s: float
    memory_s: float
    flops: float
    nbytes: float  # to and from device memory

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s)


Distinct = Callable[[float, int, int], float]  # (tokens, experts, experts per token) -> experts that wake


def expected_experts(tokens: float, experts: int, per_token: int) -> float:
    """Distinct experts that `tokens` wake when every choice is equally likely: E (1 - (1 - k/E)^T)."""
    return experts * (1.0 - pow(1.0 - per_token / experts, tokens))


def most_experts(tokens: float, experts: int, per_token: int) -> float:
    """No two tokens share an expert until all are taken: min(E, T k) (GenZ)."""
    return min(float(experts), tokens * per_token)


@dataclass(frozen=True, slots=True)
class Experts:
    """Reads the weights of the experts that wake, `nbytes` each on this device."""

    experts: int
    per_token: int
    nbytes: float
    distinct: Distinct = expected_experts


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix product, or an elementwise pass, over all tokens of the step."""

    name: str
    count: float  # times a step: layers
    flops_per_s: float  # effective
    flops: float  # per token
    weight_bytes: float = 0.0  # once a step
    token_bytes: float = 0.0  # activations in and out, per token
    constant_bytes: float = 0.0  # activations that do not follow the batch (a quirk of LLM-Viewer's head)
    experts: Experts | None = None
    sampled: bool = False  # follows the rows whose logits are needed, not the tokens
    streams: bool = False  # its activations leave the chip even when those of a decode do not

    def demand(self, tokens: float, machine: Machine, decode: bool) -> Demand:
        """One execution over `tokens` tokens."""
        weights = self.weight_bytes
        if self.experts:
            weights += self.experts.nbytes * self.experts.distinct(tokens, self.experts.experts, self.experts.per_token)
        moved = self.token_bytes * tokens + self.constant_bytes
        onchip = machine.keeps(decode) and not self.streams
        return _demand(self.flops * tokens, self.flops_per_s, weights, moved, onchip, machine)


@dataclass(frozen=True, slots=True)
class Attention:
    """Part of attention, in the layers of one window."""

    name: str
    count: float  # layers of that window
    decode: bool  # over decode rows; False: over prefill rows
    flops_per_s: float  # effective
    pair_flops: float  # per query and key
    context_flops: float = 0.0  # per key read (expanding latent vectors)
    context_bytes: float = 0.0  # KV, per key read
    pair_bytes: float = 0.0  # scores
    token_bytes: float = 0.0  # queries and outputs, per query
    window: int | None = None  # index into `Batch.windowed`; None: no window
    square: bool = False  # counts masked pairs too: every query of a prefill meets every key

    def demand(self, pairs: float, context: float, tokens: float, machine: Machine) -> Demand:
        """One execution over all rows of its phase together."""
        flops = self.pair_flops * pairs + self.context_flops * context
        kv, queries, scores = self.context_bytes * context, self.token_bytes * tokens, self.pair_bytes * pairs
        onchip = machine.keeps(self.decode)
        if machine.scores_on_chip or onchip:
            base = _demand(flops, self.flops_per_s, kv, queries, onchip, machine)
            memory_s = base.memory_s + scores / machine.onchip_bytes_per_s
            return Demand(base.compute_s, memory_s if flops else 0.0, flops, base.nbytes)
        return _demand(flops, self.flops_per_s, kv, queries + scores, False, machine)


def _demand(flops: float, rate: float, weights: float, moved: float, onchip: bool, machine: Machine) -> Demand:
    if machine.idle_without_flops and not flops:
        return Demand(0.0, 0.0, 0.0, 0.0)
    if onchip:
        memory_s = weights / machine.bytes_per_s + moved / machine.onchip_bytes_per_s
        return Demand(flops / rate, memory_s, flops, weights)
    return Demand(flops / rate, (weights + moved) / machine.bytes_per_s, flops, weights + moved)
