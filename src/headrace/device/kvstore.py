"""Where keys and values live: one plane of K and one of V per layer, cut into blocks that a block table names.

    plane of one layer:  [kv_heads, blocks * block_tokens, head_dim]      slot = block * block_tokens + offset

Heads are outermost, so that gathering some blocks gives each head its keys as one contiguous matrix.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.core.shape import ModelShape
from headrace.core.types import HeadraceError


@dataclass(frozen=True, slots=True)
class Kept:
    """Memory of somebody else, as a file descriptor: it outlives this process. `good`: what is in it stays; if not, it
    is emptied."""

    fd: int
    good: bool = False


class KVStore:
    """Owns the KV tensors of all layers. Which block belongs to whom is the scheduler's business. On a CPU they may lie
    in memory that is `kept`."""

    def __init__(
        self,
        shape: ModelShape,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        kept: Kept | None = None,
    ) -> None:
        size = (shape.kv_heads, blocks * block_tokens, shape.head_dim)
        if kept is not None and device.type == "cpu":
            planes = _planes_in(kept, 2 * shape.layers, size, dtype)
            self.keys, self.values = planes[: shape.layers], planes[shape.layers :]
        else:
            self.keys = [_zeros(size, dtype, device) for _ in range(shape.layers)]
            self.values = [_zeros(size, dtype, device) for _ in range(shape.layers)]
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._scratch = threading.local()  # two stretches of memory for each thread that reads

    @staticmethod
    def block_bytes(shape: ModelShape, block_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of one block in all layers, K and V."""
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * block_tokens * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in (*self.keys, *self.values))

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


def _planes_in(kept: Kept, count: int, size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """So many planes one after the other, each from a page on. Raises HeadraceError for content of another size."""
    page = mmap.ALLOCATIONGRANULARITY
    stride = -(-math.prod(size) * dtype.itemsize // page) * page
    if kept.good and os.fstat(kept.fd).st_size != count * stride:
        raise HeadraceError("the KV that was kept is not of this model's size; forget it and load the model anew")
    if not kept.good:
        os.ftruncate(kept.fd, 0)  # pages that come from the kernel are zero
        os.ftruncate(kept.fd, count * stride)
    pages = mmap.mmap(kept.fd, count * stride)
    elements = math.prod(size)
    return [torch.frombuffer(pages, dtype=dtype, count=elements, offset=at * stride).view(size) for at in range(count)]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because masked slots are multiplied by probability 0 and 0 * NaN is not 0. On a CPU the pages come from
    the kernel when they are first written, so a large KV memory costs nothing until it is used."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(size) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(size)
