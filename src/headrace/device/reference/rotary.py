"""Rotary position embedding with torch: angles of the positions of a step, once per step, so that a row depends on its
own position only and no table has to grow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.device.rope import Rope


class Rotary:
    """A rope with its frequencies on a device."""

    __slots__ = ("_frequencies", "_rope")

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self._rope = rope
        self._frequencies = torch.from_numpy(rope.frequencies()).to(device)

    def at(self, positions: Tensor) -> Rotation:
        """What turns rows at `positions` [T]."""
        rope, angles = self._rope, positions[:, None].float() * self._frequencies
        if rope.kind == "dynamic":
            beyond = positions[:, None] >= rope.original_tokens
            grown = torch.from_numpy(rope.frequencies_at(positions.cpu().numpy())).to(positions.device)
            angles = torch.where(beyond, positions[:, None].float() * grown, angles)
        cos, sin = angles.cos(), angles.sin()
        if rope.attention_factor != 1.0:
            cos, sin = cos.mul_(rope.attention_factor), sin.mul_(rope.attention_factor)
        return Rotation(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))


@dataclass(frozen=True, slots=True)
class Rotation:
    """float32 cos and sin of every row of a step, repeated for both halves of a head; sin is negative in the first."""

    cos: Tensor  # [T, 1, head_dim]
    sin: Tensor  # [T, 1, head_dim]

    def turn(self, x: Tensor) -> Tensor:
        """x [T, heads, head_dim] turned, computed in float32, in the type of x.

            [a | b]  ->  [a | b] * [cos | cos]  +  [b | a] * [-sin | sin]

        Four kernels of one rounding per element each. A kernel that multiplies and adds may round differently in its
        vector loop and in the tail of it (torch's complex product does), and a row's bits would depend on its place.
        """
        swapped = x.roll(x.shape[-1] // 2, -1)
        return (x * self.cos).add_(swapped * self.sin).to(x.dtype)
