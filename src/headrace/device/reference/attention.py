"""Paged causal attention over the blocks of many requests at once: decoding, prefill chunks and mixtures of both.

The kernel is chosen in one place, `kernel_for`. `TiledAttention` is plain torch and runs everywhere. It cuts the rows
of a step into query tiles of consecutive positions of one request, and the keys into tiles at fixed positions:

               key tile 0   key tile 1   key tile 2          a query tile meets its key tiles one after the other
    q tile A   ..........   ..........   ....\\               and keeps a running maximum, sum and weighted value
    q tile B   ..........   ...\\                            (online softmax, Milakov and Gimelshein 2018)

So every row sees the same numbers in the same order whoever else is in the step, however its prompt was chunked: a
masked key contributes an exact 0. Tiles of queries come in two sizes, one for decoding and one for prefill, and the
matrix products of both are checked at load to give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.core.shape import ModelShape
from headrace.device.forward import Rows
from headrace.device.reference.tensorstore import TensorStore

KEY_TILE = 128  # keys met at once; a multiple of every block size
PREFILL_TILE = 64  # query positions of one tile
ROW_MULTIPLES = (4, 8, 16)  # tile rows are padded to one of these: other counts take other paths in the library
_FAINT = -80.0  # exponents below this count as this: exp underflows further down, and is ten times as slow there
_MASKED = -1e30  # not -inf: a row may find a whole tile masked, and (-inf) - (-inf) is not a number


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim]; stores k and v."""
        ...


class Kernel(Protocol):
    def prepare(self, rows: Sequence[Rows], total_rows: int) -> Attend:
        """Lay out one step; rows from the last request's end to `total_rows` are padding."""
        ...


def kernel_for(shape: ModelShape, scale: float, store: TensorStore, device: torch.device) -> Kernel:
    """The one place that chooses the attention kernel."""
    return TiledAttention(shape, scale, store, device)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Query tiles of one size, those with the most key tiles first, so that key tile j is met by the first
    `meeting[j]` of them."""

    take: Tensor  # [n * positions] rows of the batch; rows of no request repeat a real one
    put: tuple[Tensor, Tensor]  # (index into the flat tile rows, row of the batch) of the real rows
    positions: int  # rows of one tile
    strips: tuple[Tensor, ...]  # per key tile, where its blocks lie: [kv_heads, met, blocks per key tile]
    meeting: tuple[int, ...]
    masks: tuple[tuple[Tensor, Tensor] | None, ...]
    """Per key tile what to add to the scores and what to multiply the weights with, [met, positions, 1, KEY_TILE] each;
    None where everything is visible."""


class TiledAttention:
    """Attention in plain torch: float32 arithmetic whatever the format of the stored KV."""

    def __init__(self, shape: ModelShape, scale: float, store: TensorStore, device: torch.device) -> None:
        if KEY_TILE % store.block_tokens:
            raise ValueError(f"block_tokens must divide {KEY_TILE}, not {store.block_tokens}")
        self.shape, self.scale, self.store, self.device = shape, scale, store, device
        self.group = shape.heads // shape.kv_heads
        self.windows = shape.windows or (None,) * shape.layers
        exact = [multiple for multiple in ROW_MULTIPLES if self._exact(multiple)]
        self.row_multiple = exact[0] if exact else ROW_MULTIPLES[-1]
        self.decode_tile = 1 if exact else PREFILL_TILE

    def prepare(self, rows: Sequence[Rows], total_rows: int) -> Attend:
        slots = np.concatenate([_slots(part, self.store.block_tokens) for part in rows])
        written = torch.from_numpy(slots).to(self.device)
        single = [part for part in rows if part.count == 1]
        several = [part for part in rows if part.count > 1]
        layouts = {
            window: [
                self._tiles(parts, positions, window)
                for parts, positions in ((single, self.decode_tile), (several, PREFILL_TILE))
                if parts
            ]
            for window in set(self.windows)
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.store.write(layer, written, k[: len(written)], v[: len(written)])
            out = torch.zeros_like(q)
            for tiles in layouts[self.windows[layer]]:
                self._attend(layer, q, tiles, out)
            return out

        return attend

    def _tiles(self, parts: Sequence[Rows], positions: int, window: int | None) -> _Tiles:
        cut = [
            _QueryTile(part, offset, min(positions, part.count - offset), window)
            for part in parts
            for offset in range(0, part.count, positions)
        ]
        cut.sort(key=lambda tile: -tile.key_tiles)  # stable: equal ones stay in batch order
        most = cut[0].key_tiles
        per_tile = KEY_TILE // self.store.block_tokens
        blocks = np.zeros((len(cut), most * per_tile), dtype=np.int64)
        take = np.empty((len(cut), positions), dtype=np.int64)
        for index, tile in enumerate(cut):
            table = tile.part.blocks[tile.first_key_tile * per_tile :][: tile.key_tiles * per_tile]
            blocks[index, : len(table)] = table
            take[index] = tile.part.first_row + tile.offset + np.minimum(np.arange(positions), tile.count - 1)
        at = take + np.array([tile.part.start - tile.part.first_row for tile in cut])[:, None]
        first_key = np.array([tile.first_key_tile * KEY_TILE for tile in cut])
        real = np.arange(positions) < np.array([tile.count for tile in cut])[:, None]
        meeting = tuple(sum(tile.key_tiles > j for tile in cut) for j in range(most))
        by_tile = self._tensor(blocks).view(len(cut), most, per_tile)
        return _Tiles(
            take=self._tensor(take.ravel()),
            put=(self._tensor(np.flatnonzero(real)), self._tensor(take[real])),
            positions=positions,
            strips=tuple(self.store.strips(by_tile[:n, j]) for j, n in enumerate(meeting)),
            meeting=meeting,
            masks=tuple(self._mask(at[:n], first_key[:n] + j * KEY_TILE, window) for j, n in enumerate(meeting)),
        )

    def _mask(self, at: np.ndarray, first_key: np.ndarray, window: int | None) -> tuple[Tensor, Tensor] | None:
        """(0, 1) where a row at position `at` [n, positions] may see a key, (`_MASKED`, 0) elsewhere."""
        keys = first_key[:, None, None] + np.arange(KEY_TILE)
        hidden = keys > at[:, :, None]
        if window is not None:
            hidden |= keys <= at[:, :, None] - window
        if not hidden.any():
            return None
        hidden = hidden[:, :, None, :]
        return self._tensor(np.where(hidden, np.float32(_MASKED), np.float32(0))), self._tensor(~hidden * np.float32(1))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _attend(self, layer: int, q: Tensor, tiles: _Tiles, out: Tensor) -> None:
        """Attention of the rows in `tiles`, into `out` [T, heads, head_dim]."""
        n, positions, real = tiles.meeting[0], tiles.positions, tiles.positions * self.group
        kv_heads, width = self.shape.kv_heads, self.shape.head_dim
        rows = _padded(real, self.row_multiple)
        picked = q.index_select(0, tiles.take).float().mul_(self.scale)
        by_head = picked.view(n, positions, kv_heads, self.group, width).permute(2, 0, 1, 3, 4)
        query = picked.new_zeros((kv_heads, n, rows, width))
        query[:, :, :real] = by_head.reshape(kv_heads, n, real, width)
        highest = query.new_full((kv_heads, n, real, 1), -math.inf)
        total = query.new_zeros((kv_heads, n, real, 1))
        value = query.new_zeros((kv_heads, n, real, width))
        for j, met in enumerate(tiles.meeting):
            self._meet(layer, query[:, :met], tiles, j, highest[:, :met], total[:, :met], value[:, :met])
        value.div_(total)
        by_row = value.reshape(kv_heads, n, positions, self.group, width).permute(1, 2, 0, 3, 4)
        flat = by_row.reshape(n * positions, -1, width)
        source, target = tiles.put
        out.index_copy_(0, target, flat.index_select(0, source).to(out.dtype))

    def _meet(
        self, layer: int, query: Tensor, tiles: _Tiles, j: int, highest: Tensor, total: Tensor, value: Tensor
    ) -> None:
        """One key tile: query [kv_heads, n, rows, head_dim]; updates the running maximum, sum and value in place."""
        kv_heads, n, rows, width = query.shape
        keys, values = self.store.read(layer, tiles.strips[j])
        scores = torch.bmm(query.reshape(kv_heads * n, rows, width), keys.float().transpose(1, 2))
        scores = scores.view(kv_heads, n, rows, KEY_TILE)
        real = scores[:, :, : tiles.positions * self.group]  # rows of padding stay what they are, and are never read
        by_position = real.view(kv_heads, n, tiles.positions, self.group, KEY_TILE)
        if (mask := tiles.masks[j]) is not None:
            by_position.add_(mask[0])
        new = torch.maximum(highest, real.amax(-1, keepdim=True))
        kept = (highest - new).clamp_(min=_FAINT).exp_()
        chance = real.sub_(new).clamp_(min=_FAINT).exp_()
        if mask is not None:
            by_position.mul_(mask[1])
        total.mul_(kept).add_(chance.sum(-1, keepdim=True))
        seen = torch.bmm(scores.view(kv_heads * n, rows, KEY_TILE), values.float())
        value.mul_(kept).add_(seen.view(kv_heads, n, rows, width)[:, :, : tiles.positions * self.group])
        highest.copy_(new)

    def _exact(self, multiple: int) -> bool:
        """Whether both products give a row the same bits in a decode tile as in a prefill tile, alone or batched."""
        decode, prefill = _padded(self.group, multiple), _padded(PREFILL_TILE * self.group, multiple)
        generator = torch.Generator().manual_seed(0)
        for width, wide in ((self.shape.head_dim, KEY_TILE), (KEY_TILE, self.shape.head_dim)):
            left = torch.randn(24, prefill, width, generator=generator)
            right = torch.randn(24, width, wide, generator=generator)
            whole = torch.bmm(left, right)
            for batch, rows in ((24, decode), (3, decode), (1, decode), (1, prefill)):
                part = torch.bmm(left[:batch, :rows].contiguous(), right[:batch])
                if not torch.equal(part, whole[:batch, :rows]):
                    return False
        return True


@dataclass(frozen=True, slots=True)
class _QueryTile:
    """`count` consecutive positions of one request, from `offset` in its rows of this step."""

    part: Rows
    offset: int
    count: int
    window: int | None

    @property
    def first_key_tile(self) -> int:
        oldest = self.part.start + self.offset - self.window + 1 if self.window is not None else 0
        return max(0, oldest) // KEY_TILE

    @property
    def key_tiles(self) -> int:
        return (self.part.start + self.offset + self.count - 1) // KEY_TILE - self.first_key_tile + 1


def _slots(part: Rows, block_tokens: int) -> np.ndarray:
    at = np.arange(part.start, part.start + part.count)
    return part.blocks[at // block_tokens] * block_tokens + at % block_tokens


def _padded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple
