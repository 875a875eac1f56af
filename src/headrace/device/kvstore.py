"""Where keys and values live on a CPU: one plane of K and one of V per layer, cut into blocks that a block table names.

    plane of one layer:  [kv_heads, blocks * block_tokens, head_dim]      slot = block * block_tokens + offset

Heads are outermost, so that gathering some blocks gives each head its keys as one contiguous matrix.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass

import numpy as np

from headrace.core.shape import ModelShape
from headrace.core.types import HeadraceError


@dataclass(frozen=True, slots=True)
class Kept:
    """Memory of somebody else, as a file descriptor: it outlives this process. `good`: what is in it stays; if not, it
    is emptied."""

    fd: int
    good: bool = False


class KVStore:
    """Owns the KV planes of all layers. Which block belongs to whom is the scheduler's business. They may lie in memory
    that is `kept`."""

    def __init__(
        self, shape: ModelShape, blocks: int, block_tokens: int, dtype: np.dtype, kept: Kept | None = None
    ) -> None:
        size = (shape.kv_heads, blocks * block_tokens, shape.head_dim)
        planes = _planes(kept, 2 * shape.layers, size, dtype)
        self.keys, self.values = planes[: shape.layers], planes[shape.layers :]
        self.blocks = blocks
        self.block_tokens = block_tokens

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in (*self.keys, *self.values))


def block_bytes(shape: ModelShape, block_tokens: int, itemsize: int) -> int:
    """Bytes of one block in all layers, K and V, of numbers of so many bytes."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * block_tokens * itemsize


def _planes(kept: Kept | None, count: int, size: tuple[int, ...], dtype: np.dtype) -> list[np.ndarray]:
    """So many planes, each from a page on. Zeros where nothing was kept, because masked slots are multiplied by
    probability 0 and 0 * NaN is not 0; the kernel gives the pages when they are first written, so a large KV memory
    costs nothing until it is used. Raises HeadraceError for content of another size."""
    page = mmap.ALLOCATIONGRANULARITY
    stride = -(-math.prod(size) * dtype.itemsize // page) * page
    if kept is None:
        pages = mmap.mmap(-1, count * stride)
    else:
        if kept.good and os.fstat(kept.fd).st_size != count * stride:
            raise HeadraceError("the KV that was kept is not of this model's size; forget it and load the model anew")
        if not kept.good:
            os.ftruncate(kept.fd, 0)  # pages that come from the kernel are zero
            os.ftruncate(kept.fd, count * stride)
        pages = mmap.mmap(kept.fd, count * stride)
    elements = math.prod(size)
    return [np.frombuffer(pages, dtype, elements, at * stride).reshape(size) for at in range(count)]
