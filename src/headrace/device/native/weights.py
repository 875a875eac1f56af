"""A checkpoint's weights in the panels that the native kernels read: packed once, from the mapped file, not expanded.

Decides in which format each matrix is kept: the file's own where a panel has it, so that its integers and scales are
the ones that multiply, and otherwise the narrowest that loses little. Owns the packed memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import numpy as np

from headrace.core.shape import BF16, FP32, Q4, Q8, WeightFormat
from headrace.device.architecture import LlamaConfig
from headrace.device.arrays import BF16 as BF16_ARRAY
from headrace.device.arrays import Arena, floats
from headrace.device.checkpoint import GGUFTensors, Tensors
from headrace.device.modelfile import BadModelFile
from headrace.device.native import library as native

FORMATS: tuple[WeightFormat, ...] = (FP32, BF16, Q8, Q4)  # by their number in layout.h
_FLOATS = 0  # the source number of rows of float32


@dataclass(frozen=True, slots=True)
class Kept:
    """How a stored type is kept: in `format`, block by block if `source` is its number in GGUF files, else through
    float32."""

    format: WeightFormat
    source: int = _FLOATS


# Q4_0, Q4_1, Q5_0 and Q8_0 lose nothing. Other block formats have finer scales than a panel and are rounded to 8 bits.
_AS_STORED: Mapping[str, Kept] = MappingProxyType(
    {
        "Q4_0": Kept(Q4, 2), "Q4_1": Kept(Q4, 3), "Q5_0": Kept(Q8, 6), "Q8_0": Kept(Q8, 8),
        "Q5_1": Kept(Q8), "Q4_K": Kept(Q8), "Q5_K": Kept(Q8), "Q6_K": Kept(Q8), "BF16": Kept(BF16),
    }
)  # fmt: skip


@dataclass(slots=True)
class Packer:
    """Packs matrices of one checkpoint. `wanted` is a format for all of them, or None for the file's own."""

    tensors: Tensors
    wanted: WeightFormat | None
    threads: int
    memory: list[np.ndarray] = field(default_factory=list)
    packed: Callable[[int], None] = lambda _: None  # hears how many bytes, after each matrix
    bits: dict[str, int] = field(default_factory=dict)  # format -> weights kept in it
    embedding_bytes: int = 0
    _arena: Arena = field(default_factory=Arena)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.memory)

    def matrix(self, name: str, outputs: int, inputs: int, bias: bool = False) -> native.Matrix:
        if self.tensors.shape(f"{name}.weight") != (outputs, inputs):
            stored = [*self.tensors.shape(f"{name}.weight")]
            raise BadModelFile(
                f"Tensor {name}.weight has shape {stored}, but the model config says {[outputs, inputs]}."
            )
        kept = self._kept(name)
        rows = self._rows(f"{name}.weight", kept)
        format = FORMATS.index(kept.format)
        found = native.library()
        assert found is not None
        panels = self._arena.empty(found.headrace_packed_bytes(format, outputs, inputs))
        found.headrace_pack(
            format, kept.source, rows.ctypes.data, rows.strides[0], outputs, inputs, panels.ctypes.data, self.threads
        )
        self.memory.append(panels)
        self.tensors.release()
        self.packed(self.nbytes)
        self.bits[kept.format.name] = self.bits.get(kept.format.name, 0) + outputs * inputs
        return native.Matrix(
            format, outputs, inputs, 0, panels.ctypes.data, self.vector(f"{name}.bias", outputs) if bias else None
        )

    def expected_bytes(self) -> int:
        """What `memory` will hold when all of the model has been packed, about; `bits` will be as it is now."""
        found, total = native.library(), 0
        assert found is not None
        for stored in self.tensors.names():
            shape = self.tensors.shape(stored)
            if len(shape) == 2 and stored.endswith(".weight"):
                kept = self._kept(stored.removesuffix(".weight"))
                total += found.headrace_packed_bytes(FORMATS.index(kept.format), *shape)
                self.bits[kept.format.name] = self.bits.get(kept.format.name, 0) + prod(shape)
            else:
                total += 4 * prod(shape)
        return total

    @property
    def formats(self) -> str:
        """What most weights are kept in, then the others."""
        return "+".join(sorted(self.bits, key=lambda each: -self.bits[each]))

    def vector(self, name: str, count: int, add: float = 0.0) -> int:
        """A norm's or a bias's address, in float32."""
        vector = floats(self.tensors.array(name)) + np.float32(add)
        if vector.shape != (count,):
            raise BadModelFile(f"Tensor {name} has shape {[*vector.shape]}, but the model config says {[count]}.")
        return self.keep(vector)

    def keep(self, vectors: np.ndarray) -> int:
        self.memory.append(np.ascontiguousarray(vectors))
        return self.memory[-1].ctypes.data

    def _kept(self, name: str) -> Kept:
        stored = _AS_STORED.get(self._stored(f"{name}.weight"), Kept(FP32))
        if self.wanted is None or self.wanted == stored.format:
            return stored
        return Kept(Q8 if self.wanted == Q4 and name in ("model.embed_tokens", "lm_head") else self.wanted)

    def _stored(self, name: str) -> str:
        """The type's name in a GGUF file; of safetensors only BF16 matters."""
        if isinstance(self.tensors, GGUFTensors):
            return self.tensors.raw(name)[0].name
        return "BF16" if self.tensors.array(name).dtype == BF16_ARRAY else "F32"

    def _rows(self, name: str, kept: Kept) -> np.ndarray:
        """[outputs, ...]: blocks as they are stored, or float32."""
        if kept.source != _FLOATS and isinstance(self.tensors, GGUFTensors):
            return np.ascontiguousarray(self.tensors.raw(name)[1])
        return np.ascontiguousarray(floats(self.tensors.array(name)))


def pack(config: LlamaConfig, packer: Packer) -> native.Config:
    """All of a model, as the kernels want it; `packer` keeps the memory. Raises BadModelFile for a wrong shape."""
    shape, add = config.shape, 1.0 if config.norm_adds_one else 0.0
    ropes = list(dict.fromkeys(rope for rope in config.ropes if rope is not None))
    layers = (native.Layer * shape.layers)(*[native.Layer() for _ in range(shape.layers)])
    for index, layer in enumerate(layers):
        _pack_layer(config, packer, layer, f"model.layers.{index}.")
        rope = config.ropes[index]
        layer.rope = ropes.index(rope) if rope is not None else -1
        layer.window = (shape.windows[index] if shape.windows else None) or 0
    embedding = packer.matrix("model.embed_tokens", shape.vocab, shape.hidden)
    packer.embedding_bytes = packer.memory[-1].nbytes
    head = embedding if shape.tied_embedding else packer.matrix("lm_head", shape.vocab, shape.hidden)
    return native.Config(
        shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn, shape.vocab,
        ("silu", "gelu_tanh").index(config.activation), config.norm_eps, config.attention_scale, config.embedding_scale,
        0, ctypes.cast(layers, ctypes.POINTER(native.Layer)), embedding, head,
        packer.vector("model.norm.weight", shape.hidden, add),
    )  # fmt: skip


def _pack_layer(config: LlamaConfig, packer: Packer, layer: native.Layer, at: str) -> None:
    shape, biases, names = config.shape, config.biases, config.ffn_names
    width, kv_width, add = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, float(config.norm_adds_one)
    attention, ffn = f"{at}self_attn.", f"{at}{names.block}."
    layer.q = packer.matrix(attention + "q_proj", width, shape.hidden, biases.qkv)
    layer.k = packer.matrix(attention + "k_proj", kv_width, shape.hidden, biases.qkv)
    layer.v = packer.matrix(attention + "v_proj", kv_width, shape.hidden, biases.qkv)
    layer.out = packer.matrix(attention + "o_proj", shape.hidden, width, biases.out)
    layer.gate = packer.matrix(ffn + names.gate, shape.ffn, shape.hidden, biases.ffn)
    layer.up = packer.matrix(ffn + names.up, shape.ffn, shape.hidden, biases.ffn)
    layer.down = packer.matrix(ffn + names.down, shape.hidden, shape.ffn, biases.ffn)

    def norm(name: str) -> int:
        return packer.vector(f"{at}{name}.weight", shape.hidden, add)

    layer.before_attention = norm("input_layernorm")
    if config.sandwich_norms:
        layer.after_attention, layer.after_ffn = norm("post_attention_layernorm"), norm("post_feedforward_layernorm")
    layer.before_ffn = norm("pre_feedforward_layernorm" if config.sandwich_norms else "post_attention_layernorm")
    if config.head_norms:
        q, k = (floats(packer.tensors.array(f"{attention}{name}_norm.weight")) + np.float32(add) for name in "qk")
        spread = np.concatenate((np.tile(q, (shape.heads, 1)), np.tile(k, (shape.kv_heads, 1))))
        if spread.shape[1] != shape.head_dim:
            raise BadModelFile(f"The norms of the heads at {at} have {spread.shape[1]} weights, not {shape.head_dim}.")
        layer.head_norms = packer.keep(spread)
