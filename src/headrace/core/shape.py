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
    """How keys and values are stored. K and V are separate planes of equal shape; latent attention has one plane."""

    name: str
    bits: float
    head_bits: float = 0.0  # beside the elements, of one token of one head

    def bytes_per_token(self, shape: ModelShape) -> float:
        """Bytes of K and V of one token in all layers."""
        heads = 1 if shape.latent else 2 * shape.kv_heads
        return shape.layers * (shape.kv_width * self.bits + heads * self.head_bits) / 8


FP32 = WeightFormat("fp32", 32)
BF16 = WeightFormat("bf16", 16)
Q8 = WeightFormat("q8", 8, 32, 16)  # a half scale to 32 weights
Q4 = WeightFormat("q4", 4, 32, 32)  # a half scale and a half minimum to 32 weights
KV_FP32 = KVFormat("fp32", 32)
KV_BF16 = KVFormat("bf16", 16)
KV_INT8 = KVFormat("int8", 8, 32)  # a float scale to each token of each head


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2024): one cached vector a token, expanded to K and V of every head.

    A query head has `head_dim` elements, the last `rope_dim` of which meet a rotary key shared by all heads.
    """

    kv_rank: int  # elements of the cached vector, beside the `rope_dim` of the shared key
    rope_dim: int
    value_dim: int  # of one head
    q_rank: int = 0  # queries pass through a vector of this size; 0: projected directly


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
    gated: bool = True  # False: the feed-forward has up and down but no gate
    dense_layers: int = 0  # layers of a mixture whose feed-forward is dense, `dense_ffn` wide
    dense_ffn: int = 0
    latent: Latent | None = None

    @property
    def kv_width(self) -> int:
        """Elements one token leaves in the KV of one layer."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of q, k, v and o of one layer, with the expansions of latent attention."""
        if not self.latent:
            return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        latent, queries = self.latent, self.heads * self.head_dim
        q = latent.q_rank * (self.hidden + queries) if latent.q_rank else self.hidden * queries
        kv = latent.kv_rank * self.heads * (self.head_dim - latent.rope_dim + latent.value_dim)
        return q + self.hidden * self.kv_width + kv + self.heads * latent.value_dim * self.hidden

    @property
    def expert_weights(self) -> int:
        """Weights of one feed-forward: gate, up and down, or up and down."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def ffn_weights(self) -> int:
        """Feed-forward weights of one layer (of a mixture's expert layers), all experts and the router."""
        if not self.experts:
            return self.expert_weights
        return (self.experts + self.shared_experts) * self.expert_weights + self.hidden * self.experts

    @property
    def dense_weights(self) -> int:
        """Feed-forward weights of all the dense layers of a mixture."""
        return self.dense_layers * (3 if self.gated else 2) * self.hidden * self.dense_ffn

    @property
    def layer_weights(self) -> int:
        """Weights of all layers: all of the model but embeddings, output head and norms."""
        ffn = (self.layers - self.dense_layers) * self.ffn_weights + self.dense_weights
        return self.layers * self.attention_weights + ffn

    @property
    def weights(self) -> int:
        """All weights of the model but norms, biases and learned positions."""
        return self.layer_weights + self.vocab * self.hidden * (1 if self.tied_embedding else 2)

    @property
    def active_weights(self) -> int:
        """Weights one token meets on its way: MoE counts the experts it is sent to, embeddings count once."""
        idle = (self.experts - self.experts_per_token) * self.expert_weights if self.experts else 0
        return self.layer_weights - (self.layers - self.dense_layers) * idle + self.vocab * self.hidden
