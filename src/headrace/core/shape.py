"""Models and formats as numbers: what a scheduler, a simulator and an engine all need to count bytes and work.

No tensors here. A `ModelShape` is read from a checkpoint by `device` or from a catalogue by `sim`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one weight is stored. `group` weights share `overhead_bits` of scales and zero points."""

    name: str
    bits: float
    group: int = 0  # 0: no groups
    overhead_bits: float = 0.0  # per group

    @property
    def bytes_per_weight(self) -> float:
        return (self.bits + (self.overhead_bits / self.group if self.group else 0.0)) / 8


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are stored. K and V are separate planes of equal shape."""

    name: str
    bits: float

    def bytes_per_token(self, shape: ModelShape) -> float:
        """Bytes of K and V of one token in all layers."""
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * self.bits / 8


FP32 = WeightFormat("fp32", 32)
BF16 = WeightFormat("bf16", 16)
KV_FP32 = KVFormat("fp32", 32)
KV_BF16 = KVFormat("bf16", 16)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer, dense or mixture of experts. Lengths are in elements, not bytes."""

    layers: int
    hidden: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    ffn: int  # width of the (or of one expert's) gated feed-forward
    vocab: int
    max_context_tokens: int
    tied_embedding: bool = False
    experts: int = 0  # 0: dense
    experts_per_token: int = 0
    shared_experts: int = 0
    windows: tuple[int | None, ...] = ()  # attention window per layer in tokens; empty or None: all that came before

    @property
    def attention_weights(self) -> int:
        """Weights of q, k, v and o of one layer."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """Weights of one gated feed-forward: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def ffn_weights(self) -> int:
        """Feed-forward weights of one layer, all experts and the router."""
        if not self.experts:
            return self.expert_weights
        return (self.experts + self.shared_experts) * self.expert_weights + self.hidden * self.experts

    @property
    def weights(self) -> int:
        """All weights of the model but the norms."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embedding else 2)
        return self.layers * (self.attention_weights + self.ffn_weights) + embeddings

    @property
    def active_weights(self) -> int:
        """Weights one token meets on its way: MoE counts the experts it is sent to, embeddings count once."""
        ffn = self.ffn_weights
        if self.experts:
            ffn -= (self.experts - self.experts_per_token) * self.expert_weights
        return self.layers * (self.attention_weights + ffn) + self.vocab * self.hidden
