"""What sits where: a model in given formats, cut over the devices of one replica. Bytes only, no time.

Owns the arithmetic of memory: weights and KV of the fullest device, and how many tokens of KV fit beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from headrace.core.shape import BF16, KV_BF16, KVFormat, ModelShape, WeightFormat
from headrace.core.types import HeadraceError
from headrace.sim.hardware import Device, Link, Topology


class BadPlacement(HeadraceError):
    """A model cannot be cut that way, or not over so few devices."""


@dataclass(frozen=True, slots=True)
class Formats:
    """How numbers are stored. Embeddings and output head keep 16 bits unless said otherwise."""

    weights: WeightFormat = BF16
    kv: KVFormat = KV_BF16
    activation_bits: float = 16
    head: WeightFormat | None = None  # None: as the weights, but at least 16 bits

    @property
    def head_bytes(self) -> float:
        """Bytes of one weight of embedding or output head."""
        if self.head:
            return self.head.bytes_per_weight
        return max(self.weights.bytes_per_weight, 2.0)


@dataclass(frozen=True, slots=True)
class Parallel:
    """How one replica is cut. It has tensor x pipeline devices; whole replicas are the fleet's business.

    pipeline stage 0            pipeline stage 1
    [d0 d1 | d2 d3]             [d4 d5 | d6 d7]        tensor = 4, data = 2, pipeline = 2
     copy 0  copy 1  <- of the attention weights: each serves its own requests with tensor/data devices
    [  one cut over all four  ] <- feed-forward weights
    """

    tensor: int = 1  # devices of one stage
    pipeline: int = 1  # stages, each with its share of the layers
    data: int = 1  # copies of the attention within a stage; divides `tensor`
    spread_experts: bool = False  # experts lie whole on one device each; False: every expert is cut `tensor` ways
    microbatches: int = 1  # a step is cut into so many that follow each other through the stages

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline

    @property
    def attention(self) -> int:
        """Devices that share the heads of one copy of the attention."""
        return self.tensor // self.data


@dataclass(frozen=True, slots=True)
class Placement:
    """One replica: a model on the first devices of a topology. Raises BadPlacement when it cannot be cut so."""

    shape: ModelShape
    topology: Topology
    parallel: Parallel = Parallel()
    formats: Formats = field(default_factory=Formats)

    def __post_init__(self) -> None:
        plan, shape = self.parallel, self.shape
        if min(plan.tensor, plan.pipeline, plan.data, plan.microbatches) < 1:
            raise BadPlacement("Every degree of parallelism is at least 1.")
        if plan.tensor % plan.data:
            raise BadPlacement(f"{plan.data} attention copies do not share {plan.tensor} devices evenly.")
        if shape.heads % plan.attention:
            raise BadPlacement(f"{shape.heads} query heads cannot be cut over {plan.attention} devices.")
        if plan.pipeline > shape.layers:
            raise BadPlacement(f"{shape.layers} layers cannot fill {plan.pipeline} stages.")
        if plan.devices > self.topology.devices:
            raise BadPlacement(f"The plan needs {plan.devices} devices; the topology has {self.topology.devices}.")
        if plan.spread_experts and (not shape.experts or shape.experts % plan.tensor):
            raise BadPlacement(f"{shape.experts} experts do not spread evenly over {plan.tensor} devices.")

    @property
    def device(self) -> Device:
        return self.topology.device

    @property
    def stage_layers(self) -> int:
        """Layers of the fullest stage."""
        return ceil(self.shape.layers / self.parallel.pipeline)

    @property
    def kv_shards(self) -> int:
        """Over how many devices one token's KV is cut; beyond that, heads (or the one latent vector) are repeated."""
        return 1 if self.shape.latent else min(self.parallel.attention, self.shape.kv_heads)

    @property
    def attention_weights(self) -> float:
        """Attention weights of one layer on one device. Key and value projections repeat like their heads."""
        shape, ways = self.shape, self.parallel.attention
        shared = shape.hidden * shape.kv_width  # k and v, or the way down to the latent vector
        if shape.latent:
            shared += shape.hidden * shape.latent.q_rank
        return (shape.attention_weights - shared) / ways + shared / self.kv_shards

    @property
    def spread(self) -> bool:
        """Whether whole experts lie on different devices while requests stay on one."""
        return self.parallel.spread_experts and self.parallel.data > 1

    @property
    def dense_ways(self) -> int:
        """Over how many devices the feed-forward that every token passes is cut: those of a stage, but beside spread
        experts those of one copy of the attention, as tokens then need not move for it (SGLang, DeepSeek)."""
        return self.parallel.attention if self.spread else self.parallel.tensor

    @property
    def layer_weights(self) -> float:
        """Weights of the layers of the fullest stage on one device."""
        shape = self.shape
        feed_forward = shape.layer_weights - shape.layers * shape.attention_weights
        routed = (shape.layers - shape.dense_layers) * shape.experts * shape.expert_weights
        each = (routed / self.parallel.tensor + (feed_forward - routed) / self.dense_ways) / shape.layers
        return self.stage_layers * (self.attention_weights + each)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on the fullest device. With several stages, embedding and head lie on different ones."""
        tables = 1 if self.shape.tied_embedding or self.parallel.pipeline > 1 else 2
        table = self.shape.vocab * self.shape.hidden * self.formats.head_bytes / self.parallel.tensor
        return self.layer_weights * self.formats.weights.bytes_per_weight + tables * table

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes one token's KV takes on a device that holds it."""
        whole = self.formats.kv.bytes_per_token(self.shape)
        return whole * self.stage_layers / self.shape.layers / self.kv_shards

    def kv_tokens(self, memory_share: float = 0.9, reserved_bytes: float = 0.0) -> int:
        """Tokens of KV the replica holds when weights, KV and `reserved_bytes` may fill `memory_share` of a device.

        0 when the weights alone do not fit.
        """
        free = memory_share * self.device.memory_bytes - self.weight_bytes - reserved_bytes
        return max(0, int(free // self.kv_bytes_per_token)) * self.parallel.data

    def swap_s(self, tokens: int, link: Link | None = None) -> float:
        """Seconds to move one request's KV out to the host and back, every device its own part, over its own link."""
        road = link or self.device.host
        if road is None:
            raise BadPlacement(f"{self.device.name} is its own host; there is nowhere to swap to.")
        return 2 * road.transfer_s(tokens * self.kv_bytes_per_token)
