"""Keys and values as torch sees them: the planes of a `KVStore` on a CPU, memory of the device's own elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from headrace.core.shape import ModelShape
from headrace.device.arrays import BF16, as_tensor
from headrace.device.kvstore import Kept, KVStore

_ARRAYS: Mapping[torch.dtype, np.dtype] = {torch.float32: np.dtype("<f4"), torch.bfloat16: BF16}


class TensorStore:
    """The KV of all layers on one device, and how rows get in and out. On a CPU it may lie in memory that is `kept`."""

    def __init__(
        self,
        shape: ModelShape,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        kept: Kept | None = None,
    ) -> None:
        self.planes: KVStore | None = None  # of a CPU
        if device.type == "cpu":
            self.planes = KVStore(shape, blocks, block_tokens, _ARRAYS[dtype], kept)
            self.keys = [as_tensor(plane) for plane in self.planes.keys]
            self.values = [as_tensor(plane) for plane in self.planes.values]
        else:
            size = (shape.kv_heads, blocks * block_tokens, shape.head_dim)
            self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
            self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._scratch = threading.local()  # two stretches of memory for each thread that reads

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys`, `values` [T, kv_heads, head_dim] at `slots` [T]."""
        self.keys[layer].index_copy_(1, slots, keys.transpose(0, 1))
        self.values[layer].index_copy_(1, slots, values.transpose(0, 1))

    def strips(self, blocks: Tensor) -> Tensor:
        """Where `blocks` [n, m] lie in a plane seen as strips of one head's block: [kv_heads, n, m], for `read`."""
        heads = torch.arange(self.keys[0].shape[0], device=blocks.device) * self.blocks
        return heads[:, None, None] + blocks

    def read(self, layer: int, strips: Tensor) -> tuple[Tensor, Tensor]:
        """K and V at `strips` [kv_heads, n, m], each [kv_heads * n, m * block_tokens, head_dim]: copies in scratch
        memory, good until the thread's next read."""
        planes = (self.keys[layer], self.values[layer])
        keys, values = (self._gather(plane, strips, which) for which, plane in enumerate(planes))
        return keys, values

    def _gather(self, plane: Tensor, strips: Tensor, which: int) -> Tensor:
        heads, n, m = strips.shape
        width = plane.shape[-1]
        by_strip = plane.view(heads * self.blocks, self.block_tokens * width)
        scratch: dict[int, Tensor] = self._scratch.__dict__.setdefault("planes", {})
        elements = strips.numel() * by_strip.shape[1]
        if which not in scratch or scratch[which].numel() < elements:
            scratch[which] = plane.new_empty(elements)
        out = scratch[which][:elements].view(strips.numel(), -1)
        return torch.index_select(by_strip, 0, strips.flatten(), out=out).view(heads * n, m * self.block_tokens, width)
