"""The Llama family, as it would be drawn on a board: Llama, Mistral, Mixtral, Qwen 2 and 3, SmolLM, Gemma 3 text.

A step is T rows, tokens of several requests side by side; `positions` says where each stands in its own sequence.

    ids -> embed -> [ x + out(attend(rope(qkv(norm x))));  x + ffn(norm x) ] * layers -> norm -> head -> logits

Owns weights that are not packed by `linear`: embeddings and norms. Kernels of linear layers and of attention, and the
KV memory, belong to the caller. Nothing here mixes rows, and every kernel gives a row the same bits wherever it lies
in the step: one rounding per elementwise kernel, reductions along a row only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headrace.device.architecture import Activation, LlamaConfig
from headrace.device.modelfile import BadModelFile
from headrace.device.reference.rotary import Rotary, Rotation

__all__ = ["Attend", "Linear", "Llama", "LlamaConfig", "PackLinear"]

Linear = Callable[[Tensor], Tensor]  # x [T, in] -> [T, out]
PackLinear = Callable[[Tensor, Tensor | None], Linear]  # weight [out, in] and bias [out] -> the layer
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""layer, q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim]: stores k and v, attends."""


class Llama:
    """A model on a device. Calls allocate activations only; the caller wraps them in `torch.inference_mode`."""

    def __init__(
        self,
        config: LlamaConfig,
        tensor: Callable[[str], Tensor],
        linear: PackLinear,
        dtype: torch.dtype,
        device: torch.device,
        padded: Callable[[int], int] = lambda rows: rows,
        writes: bool = True,
    ) -> None:
        """Loads tensor by tensor, so that one layer at most is held twice. `tensor` gives a weight by its Hugging
        Face name and raises for one it lacks. `padded` rounds a number of rows up to one that every `linear` computes
        exactly; experts need it, for they see a part of the step. One that does not write has no head: its `logits`
        are the normed states. Raises BadModelFile for a wrong shape."""
        self.config = config
        weights = _Weights(config, tensor, linear, dtype, device, padded)
        shape = config.shape
        self._embedding = weights.take("model.embed_tokens.weight", shape.vocab, shape.hidden)
        self._layers = [_Layer(weights, layer) for layer in range(shape.layers)]
        self._norm = weights.norm("model.norm.weight")
        self._head = weights.head(self._embedding) if writes else _same
        self._rotaries = {rope: Rotary(rope, device) for rope in config.ropes if rope is not None}
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of embeddings and norms; packed weights are counted by whoever packs them."""
        return self._embedding.nbytes + self._norm.nbytes + sum(layer.norm_bytes for layer in self._layers)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [T] -> [T, hidden]."""
        x = functional.embedding(ids, self._embedding)
        return x if self.config.embedding_scale == 1.0 else x.mul_(self._embedding_scale)

    def layers(self, x: Tensor, first: int, last: int, positions: Tensor, attend: Attend) -> Tensor:
        """Layers first, ..., last - 1: x [T, hidden] at `positions` [T] -> [T, hidden]. Leaves x as it is."""
        used = {rope for rope in self.config.ropes[first:last] if rope is not None}
        rotations = {rope: self._rotaries[rope].at(positions) for rope in used}
        for layer in range(first, last):
            rope = self.config.ropes[layer]
            x = self._layers[layer](x, rotations[rope] if rope is not None else None, attend)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Rows after the last layer [R, hidden] -> [R, vocab] in float32, through the final norm."""
        return self._head(self._norm(x)).float()


class _Layer:
    """Attention and feed-forward, each added to the stream."""

    __slots__ = ("_after_attention", "_after_ffn", "_before_attention", "_before_ffn", "_ffn", "_heads",
                 "_index", "_out", "_qkv")  # fmt: skip

    def __init__(self, weights: _Weights, index: int) -> None:
        config, shape, at = weights.config, weights.config.shape, f"model.layers.{index}."
        width = shape.heads * shape.head_dim
        names = _SANDWICH if config.sandwich_norms else _PRE_NORMS
        self._index = index
        norms = [weights.norm(f"{at}{name}.weight") if name else _same for name in names]
        self._before_attention, self._after_attention, self._before_ffn, self._after_ffn = norms
        self._qkv = weights.qkv(at + "self_attn.")
        self._heads = _Heads(weights, at + "self_attn.")
        self._out = weights.linear(at + "self_attn.o_proj", shape.hidden, width, config.biases.out)
        self._ffn = _ffn(weights, f"{at}{config.ffn_names.block}.")

    @property
    def norm_bytes(self) -> int:
        norms = (self._before_attention, self._after_attention, self._before_ffn, self._after_ffn, self._heads.norm)
        return sum(norm.nbytes for norm in norms if isinstance(norm, _Norm))

    def __call__(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        q, k, v = self._heads(self._qkv(self._before_attention(x)), rotation)
        attended = attend(self._index, q, k, v).flatten(1)
        x = x + self._after_attention(self._out(attended))
        return x.add_(self._after_ffn(self._ffn(self._before_ffn(x))))


# Names of the norms around attention and around the feed-forward: before and after each.
_PRE_NORMS = ("input_layernorm", "", "post_attention_layernorm", "")
_SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _same(x: Tensor) -> Tensor:
    return x


class _Norm:
    """RMSNorm, arXiv:1910.07467: x / sqrt(mean(x^2) + eps) * weight along the last dimension, in float32.

    `weight` may have more dimensions than the mean runs over: those of q and k differ from head to head.
    """

    __slots__ = ("_eps", "_weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], None, self._eps).mul_(self._weight).to(x.dtype)


class _Heads:
    """Cuts the rows of the fused projection into heads, normalises and turns those of q and k."""

    __slots__ = ("_shape", "_turned", "norm")

    def __init__(self, weights: _Weights, at: str) -> None:
        self._shape = weights.config.shape
        self._turned = self._shape.heads + self._shape.kv_heads  # q and k lie side by side and are treated as one
        self.norm: Linear = weights.head_norms(at) if weights.config.head_norms else _same

    def __call__(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, (heads + 2 kv_heads) * head_dim] -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim]."""
        rows = qkv.view(len(qkv), -1, self._shape.head_dim)
        qk, v = rows[:, : self._turned], rows[:, self._turned :]
        qk = self.norm(qk)
        if rotation is not None:
            qk = rotation.turn(qk)
        return qk[:, : self._shape.heads], qk[:, self._shape.heads :], v


def _ffn(weights: _Weights, at: str) -> Linear:
    """The one place where dense models and mixtures of experts part."""
    shape = weights.config.shape
    if not shape.experts:
        return _FFN(weights, at)
    router = weights.linear(at + "gate", shape.experts, shape.hidden)
    experts = [_FFN(weights, f"{at}experts.{expert}.") for expert in range(shape.experts)]
    return _Mixture(router, experts, weights)


class _FFN:
    """A gated feed-forward, arXiv:2002.05202: down(act(gate x) * up x). gate and up are one matrix."""

    __slots__ = ("_act", "_down", "_gate_up")

    def __init__(self, weights: _Weights, at: str) -> None:
        shape, names, bias = weights.config.shape, weights.config.ffn_names, weights.config.biases.ffn
        sizes = {at + names.gate: shape.ffn, at + names.up: shape.ffn}
        self._gate_up = weights.stacked(sizes, shape.hidden, bias)
        self._down = weights.linear(at + names.down, shape.hidden, shape.ffn, bias)
        self._act = _ACTIVATIONS[weights.config.activation]

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down(self._act(gate, up))


class _Mixture:
    """A mixture of experts: each row goes to the `chosen` likeliest experts and takes their weighted sum.

    Experts are visited in ascending order, so the terms of a row are added in an order that is its own.
    """

    __slots__ = ("_chosen", "_experts", "_padded", "_renormalise", "_router")

    def __init__(self, router: Linear, experts: Sequence[_FFN], weights: _Weights) -> None:
        self._router = router
        self._experts = experts
        self._chosen = weights.config.shape.experts_per_token
        self._renormalise = weights.config.renormalise_experts
        self._padded = weights.padded

    def __call__(self, x: Tensor) -> Tensor:
        shares, chosen = self._router(x).float().softmax(-1).topk(self._chosen)
        if self._renormalise:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, choice = (chosen == expert).nonzero(as_tuple=True)
            share = shares[rows, choice, None].to(x.dtype)
            out.index_add_(0, rows, self._ask(expert, x[rows]).mul_(share))
        return out

    def _ask(self, expert: int, x: Tensor) -> Tensor:
        rows = len(x)
        filled = functional.pad(x, (0, 0, 0, self._padded(rows) - rows))
        return self._experts[expert](filled)[:rows]


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up.

    Spelled out on a CPU: the fused kernel computes the elements that do not fill a vector with another `exp`, so the
    last bits of a row would depend on its width and on how threads share the step. `exp` alone has no such seam.
    """
    if gate.is_cuda:
        return functional.silu(gate).mul_(up)
    wide = gate.float()
    return wide.neg().exp_().add_(1).reciprocal_().mul_(wide).mul_(up).to(gate.dtype)


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """0.5 gate (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3))) * up; arXiv:1606.08415. See `_silu`."""
    if gate.is_cuda:
        return functional.gelu(gate, approximate="tanh").mul_(up)
    wide = gate.float()
    inner = (wide * wide).mul_(0.044715).add_(1).mul_(wide).mul_((2 / torch.pi) ** 0.5)
    return inner.tanh_().add_(1).mul_(0.5).mul_(wide).mul_(up).to(gate.dtype)


_ACTIVATIONS: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {"silu": _silu, "gelu_tanh": _gelu_tanh}


class _Weights:
    """Takes tensors by name while a model is built, checks their shapes, moves and stacks them."""

    def __init__(
        self,
        config: LlamaConfig,
        tensor: Callable[[str], Tensor],
        pack: PackLinear,
        dtype: torch.dtype,
        device: torch.device,
        padded: Callable[[int], int],
    ) -> None:
        self.config = config
        self.padded = padded
        self._tensor = tensor
        self._pack = pack
        self._dtype = dtype
        self._device = device

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on the device, in the type of the model unless another is given."""
        found = self._tensor(name)
        if found.shape != shape:
            raise BadModelFile(f"Tensor {name} has shape {[*found.shape]}, but the model config says {[*shape]}.")
        return found.to(self._device, dtype or self._dtype)

    def stacked(self, outs: dict[str, int], width: int, bias: bool) -> Linear:
        """Several projections of the same input as one: name -> rows, stacked in that order."""
        weight = torch.cat([self.take(f"{name}.weight", rows, width) for name, rows in outs.items()])
        biases = [self.take(f"{name}.bias", rows) for name, rows in outs.items()] if bias else None
        return self._pack(weight, torch.cat(biases) if biases else None)

    def linear(self, name: str, rows: int, width: int, bias: bool = False) -> Linear:
        return self._pack(self.take(f"{name}.weight", rows, width), self.take(f"{name}.bias", rows) if bias else None)

    def head(self, embedding: Tensor) -> Linear:
        shape = self.config.shape
        tied = shape.tied_embedding
        return self._pack(embedding, None) if tied else self.linear("lm_head", shape.vocab, shape.hidden)

    def qkv(self, at: str) -> Linear:
        shape = self.config.shape
        heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
        sizes = {at + name: count * shape.head_dim for name, count in heads.items()}
        return self.stacked(sizes, shape.hidden, self.config.biases.qkv)

    def norm(self, name: str) -> _Norm:
        return _Norm(self._norm_weight(name, self.config.shape.hidden), self.config.norm_eps)

    def head_norms(self, at: str) -> _Norm:
        """The norms of q and of k as one, its weight [heads + kv_heads, head_dim]."""
        shape = self.config.shape
        q = self._norm_weight(at + "q_norm.weight", shape.head_dim)
        k = self._norm_weight(at + "k_norm.weight", shape.head_dim)
        return _Norm(torch.cat((q.expand(shape.heads, -1), k.expand(shape.kv_heads, -1))), self.config.norm_eps)

    def _norm_weight(self, name: str, width: int) -> Tensor:
        weight = self.take(name, width, dtype=torch.float32)
        return weight + 1.0 if self.config.norm_adds_one else weight
