"""Paged attention against a dense one, and a row's independence of its batch, its chunk and its blocks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.shape import ModelShape
from headrace.device.forward import Rows
from headrace.device.reference.attention import TiledAttention
from headrace.device.reference.tensorstore import TensorStore

CPU = torch.device("cpu")
SCALE = 0.3
BLOCK = 16
POSITIONS = 400


def shape(heads: int, kv_heads: int, window: int | None = None) -> ModelShape:
    return ModelShape(2, 64, heads, kv_heads, 16, 64, 100, 4096, windows=(None, window))


class Paged:
    """One store whose requests live in shuffled blocks, so that no test depends on neighbours in memory."""

    def __init__(self, model: ModelShape, requests: int, seed: int = 0) -> None:
        per_request = -(-POSITIONS // BLOCK)
        rng = np.random.default_rng(seed)
        self.store = TensorStore(model, requests * per_request, BLOCK, torch.float32, CPU)
        self.tables = rng.permutation(requests * per_request).reshape(requests, per_request).astype(np.int64)
        self.kernel = TiledAttention(model, SCALE, self.store, CPU)
        generator = torch.Generator().manual_seed(seed)
        size = (requests, POSITIONS)
        self.q = torch.randn(*size, model.heads, model.head_dim, generator=generator)
        self.k = torch.randn(*size, model.kv_heads, model.head_dim, generator=generator)
        self.v = torch.randn(*size, model.kv_heads, model.head_dim, generator=generator)

    def step(self, works: list[tuple[int, int, int]], layer: int = 0, padding: int = 0) -> list[torch.Tensor]:
        """Run (request, start, count) works in one step; the output rows of each."""
        rows, first = [], 0
        for request, start, count in works:
            rows.append(Rows(first, start, count, self.tables[request]))
            first += count
        attend = self.kernel.prepare(rows, first + padding)
        parts = []
        for tensor in (self.q, self.k, self.v):
            taken = torch.cat([tensor[request, start : start + count] for request, start, count in works])
            parts.append(torch.cat([taken, torch.full_like(taken[:1], math.nan).expand(padding, -1, -1)]))
        out = attend(layer, *parts)
        return list(out[:first].split([count for _, _, count in works]))

    def dense(self, request: int, window: int | None) -> torch.Tensor:
        """The textbook formula in float64."""
        q, k, v = (tensor[request].double() for tensor in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        at = torch.arange(POSITIONS)
        hidden = at[None, :] > at[:, None]
        if window is not None:
            hidden |= at[None, :] <= at[:, None] - window
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize("window", [None, 1, 50, 128, 300])
def test_equals_dense_attention(heads: int, kv_heads: int, window: int | None) -> None:
    paged = Paged(shape(heads, kv_heads, window), requests=2)
    first = paged.step([(0, 0, 300), (1, 0, 7)], layer=1)
    second = paged.step([(1, 7, 1), (0, 300, 100)], layer=1, padding=5)
    got = [torch.cat([first[0], second[1]]), torch.cat([first[1], second[0]])]
    for request, rows in enumerate(got):
        expected = paged.dense(request, window)[: len(rows)]
        assert (rows.double() - expected).abs().max() < 2e-6


chunkings = st.lists(st.integers(1, POSITIONS), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chunkings, chunkings, st.sampled_from([None, 37, 200]), st.integers(0, 3))
def test_bits_do_not_depend_on_chunks_or_neighbours(
    mine: list[int], theirs: list[int], window: int | None, padding: int
) -> None:
    """One request computed alone in one go, and in chunks beside another: the same bits."""
    model = shape(6, 2, window)
    whole = Paged(model, requests=2).step([(0, 0, POSITIONS)], layer=1)[0]
    paged = Paged(model, requests=2)
    at = [0, 0]
    rows: list[torch.Tensor] = []
    chunks = [[*mine, *[97] * 5], [*theirs, *[1] * 5]]
    while at[0] < POSITIONS:
        works = []
        for request in (1, 0):
            count = min(chunks[request].pop(0) if chunks[request] else 64, POSITIONS - at[request])
            if count:
                works.append((request, at[request], count))
                at[request] += count
        rows.append(paged.step(works, layer=1, padding=padding)[-1])
    assert torch.equal(torch.cat(rows), whole)


def test_decoding_a_whole_batch_equals_decoding_alone() -> None:
    model = shape(9, 3)
    paged, alone = Paged(model, requests=32), Paged(model, requests=32)
    lengths = [1 + 12 * request for request in range(32)]
    for request, length in enumerate(lengths):
        paged.step([(request, 0, length)])
        alone.step([(request, 0, length)])
    together = paged.step([(request, length, 1) for request, length in enumerate(lengths)])
    for request, length in enumerate(lengths):
        assert torch.equal(alone.step([(request, length, 1)])[0], together[request])
