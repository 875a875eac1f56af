"""A decoder that reads whole texts and writes nothing: the states that an embedding is made of.

B texts side by side, padded at the end to the longest. No token sees those after it, so none sees padding. Owns the
weights, in float32, without an output head; keeps no KV. Attention is computed whole: memory grows with the square of
the longest text, so texts are bounded by `encoder.MOST_TOKENS`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headrace.device.checkpoint import Checkpoint
from headrace.device.encoder import reads
from headrace.device.reference.linear import Linears
from headrace.device.reference.llama import Attend, Llama


class Reader:
    """A model on a device; the caller wraps calls in `torch.inference_mode`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Raises BadModelFile."""
        self.config = reads(checkpoint.config)
        stored = frozenset(checkpoint.names())
        bare = "model.embed_tokens.weight" not in stored  # as files are that never had a head

        def tensor(name: str) -> Tensor:
            return checkpoint.tensor(name.removeprefix("model.") if bare else name)

        self._linears = Linears(torch.float32, device)
        with torch.inference_mode():
            pack, padded = self._linears.pack, self._linears.padded
            self._model = Llama(self.config, tensor, pack, torch.float32, device, padded, writes=False)

    @property
    def nbytes(self) -> int:
        return self._linears.nbytes + self._model.nbytes

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, T] and mask [B, T], true for tokens and false for the padding after them -> states [B, T, hidden]
        behind the final norm."""
        rows, tokens = ids.shape
        padding = self._linears.padded(rows * tokens) - rows * tokens
        positions = torch.arange(tokens, device=ids.device).repeat(rows)
        x = self._model.embed(functional.pad(ids.flatten(), (0, padding)))
        attend = self._attend(rows, tokens, padding)
        x = self._model.layers(x, 0, self.config.shape.layers, functional.pad(positions, (0, padding)), attend)
        return self._model.logits(x)[: rows * tokens].view(rows, tokens, -1)

    def _attend(self, rows: int, tokens: int, padding: int) -> Attend:
        shape, masks = self.config.shape, self._windows(tokens)

        def side_by_side(x: Tensor) -> Tensor:
            """[rows * tokens + padding, heads, head_dim] -> [rows, heads, tokens, head_dim]"""
            return x[: rows * tokens].view(rows, tokens, -1, shape.head_dim).transpose(1, 2)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = masks[shape.windows[layer] if shape.windows else None]
            q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)
            scale = self.config.attention_scale
            mixed = functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            return functional.pad(mixed.transpose(1, 2).flatten(0, 1), (0, 0, 0, 0, 0, padding))

        return attend

    def _windows(self, tokens: int) -> dict[int | None, Tensor | None]:
        """For each window of the model that these texts are longer than, who sees whom: [tokens, tokens]."""
        masks: dict[int | None, Tensor | None] = {None: None}
        for window in self.config.shape.windows:
            if window is not None and window not in masks:
                seen = torch.ones(tokens, tokens, dtype=torch.bool, device=self._linears.device).tril()
                masks[window] = seen.triu(1 - window) if tokens > window else None
        return masks
