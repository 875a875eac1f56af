"""The BERT encoder of sentence-embedding models, as it would be drawn on a board (Devlin et al. 2018).

    ids + positions -> embed -> norm -> [ x = norm(x + out(attend(qkv x)));  x = norm(x + down(gelu(up x))) ] * layers

A batch is B sequences side by side, padded to the longest: every token sees all tokens of its own sequence and no
padding. Owns the weights, in float32; knows nothing of text, batches of others or what the vectors are for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from headrace.device.encoder import BertConfig
from headrace.device.modelfile import BadModelFile


class Bert:
    """A model on a device; the caller wraps calls in `torch.inference_mode`."""

    def __init__(self, config: BertConfig, tensor: Callable[[str], Tensor], device: torch.device) -> None:
        """`tensor` gives a weight by its Hugging Face name. Raises BadModelFile for a wrong shape."""
        self.config = config
        take = _Taker(tensor, device)
        h, e = config.hidden, "embeddings"
        self._words = take(f"{e}.word_embeddings.weight", config.vocab, h)
        # every token is of the first type, so its embedding is part of the position's
        types = take(f"{e}.token_type_embeddings.weight", None, h)
        self._positions = take(f"{e}.position_embeddings.weight", config.positions, h) + types[0]
        self._norm = take.norm(f"{e}.LayerNorm", h)
        self._layers = [_Layer(take, f"encoder.layer.{at}", config) for at in range(config.layers)]
        self.nbytes = take.nbytes

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, T] and mask [B, T], true for tokens and false for padding -> states [B, T, hidden]."""
        x = functional.embedding(ids, self._words) + self._positions[: ids.shape[1]]
        x = self._normed(x, self._norm)
        seen = mask[:, None, None, :]
        for layer in self._layers:
            x = self._normed(x + layer.attend(x, seen), layer.attention_norm)
            x = self._normed(x + layer.feed(x), layer.output_norm)
        return x

    def _normed(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], *norm, self.config.norm_eps)


class _Taker:
    """Takes weights in float32, checks their shapes and counts their bytes."""

    def __init__(self, tensor: Callable[[str], Tensor], device: torch.device) -> None:
        self._tensor = tensor
        self._device = device
        self.nbytes = 0

    def __call__(self, name: str, *shape: int | None) -> Tensor:
        found = self._tensor(name)
        if found.dim() != len(shape) or any(
            want not in (None, got) for want, got in zip(shape, found.shape, strict=True)
        ):
            raise BadModelFile(f"{name} has the shape {tuple(found.shape)}, which does not fit config.json")
        taken = found.to(self._device, torch.float32)
        self.nbytes += taken.nbytes
        return taken

    def linear(self, name: str, wide: int, narrow: int) -> tuple[Tensor, Tensor]:
        """Weight [wide, narrow] and bias [wide]."""
        return self(f"{name}.weight", wide, narrow), self(f"{name}.bias", wide)

    def norm(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        return self(f"{name}.weight", width), self(f"{name}.bias", width)


class _Layer:
    def __init__(self, take: _Taker, name: str, config: BertConfig) -> None:
        h, attention = config.hidden, f"{name}.attention"
        parts = [take.linear(f"{attention}.self.{part}", h, h) for part in ("query", "key", "value")]
        self._qkv = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
        self._out = take.linear(f"{attention}.output.dense", h, h)
        self.attention_norm = take.norm(f"{attention}.output.LayerNorm", h)
        self._up = take.linear(f"{name}.intermediate.dense", config.ffn, h)
        self._down = take.linear(f"{name}.output.dense", h, config.ffn)
        self.output_norm = take.norm(f"{name}.output.LayerNorm", h)
        self._heads = config.heads

    def attend(self, x: Tensor, seen: Tensor) -> Tensor:
        rows, tokens, hidden = x.shape
        qkv = functional.linear(x, *self._qkv).view(rows, tokens, 3, self._heads, hidden // self._heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return functional.linear(mixed.transpose(1, 2).reshape(rows, tokens, hidden), *self._out)

    def feed(self, x: Tensor) -> Tensor:
        return functional.linear(functional.gelu(functional.linear(x, *self._up)), *self._down)
