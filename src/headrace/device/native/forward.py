"""Rows through the layers in native code: one call for any range of layers, reading KV blocks in place.

Owns a runner (threads and scratch memory), the packed weights and the tables of rotary angles. The KV planes are the
store's, with another order of elements inside a block (`layout.h`); whoever moves whole blocks need not know.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from headrace.core.shape import KV_BF16, KV_FP32, KV_INT8, KVFormat, ModelShape
from headrace.core.step import Sampled
from headrace.core.types import HeadraceError, TokenLogprob
from headrace.device.architecture import LlamaConfig
from headrace.device.arrays import BF16
from headrace.device.forward import Rows
from headrace.device.kvstore import Kept, KVStore
from headrace.device.native import library as native
from headrace.device.native.draws import describe, log_softmax, penalise
from headrace.device.native.weights import Packer
from headrace.device.rope import Rope
from headrace.device.sampler import Row, numbers, penalties, reporting, sampled, uniform

STRIP, KEY_TILE, QUERY_ROWS, ROW_CHUNK = 16, 64, 24, 4  # layout.h, step.cpp
KV_KINDS: tuple[KVFormat, ...] = (KV_FP32, KV_BF16, KV_INT8)  # by their number in layout.h
_KV_DTYPES: Mapping[KVFormat, np.dtype] = {KV_FP32: np.dtype("<f4"), KV_BF16: BF16, KV_INT8: np.dtype("i1")}
_FIRST_POSITIONS = 1024  # of the tables of angles, which double
_SCALE_BYTES = 4  # of a token of one head


class OutOfBounds(HeadraceError):
    """A step names memory that is not there, so none of it was computed: native code does not look again."""


def why_not(config: LlamaConfig, block_tokens: int, variant: str | None = None) -> str | None:
    """What keeps a model from native kernels on this machine, as half a sentence; None if nothing does."""
    shape, found = config.shape, native.variant(variant)
    if found is None:
        return "they were not built for this machine"
    if found == "portable" and variant is None:
        return "this CPU has no AVX2, and torch is faster than portable kernels"
    if shape.experts:
        return "they have no mixture of experts"
    if shape.head_dim % STRIP or block_tokens % STRIP or shape.heads // shape.kv_heads > QUERY_ROWS:
        return f"they need heads and KV blocks in multiples of {STRIP}, and at most {QUERY_ROWS} queries to a key"
    return None


def kv_store(shape: ModelShape, blocks: int, block_tokens: int, kind: KVFormat, kept: Kept | None = None) -> KVStore:
    return KVStore(stored_shape(shape, kind), blocks, block_tokens, _KV_DTYPES[kind], kept)


def stored_shape(shape: ModelShape, kind: KVFormat) -> ModelShape:
    """The shape of the planes: int8 keeps a scale beside each token of each head."""
    return replace(shape, head_dim=shape.head_dim + _SCALE_BYTES) if kind == KV_INT8 else shape


def kv_dtype(kind: KVFormat) -> np.dtype:
    return _KV_DTYPES[kind]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of steps went."""

    linear: float
    attention: float
    head: float
    draws: float
    other: float


class NativeForward:
    """A `Forward` of one model on some cores of a CPU. Several may share packed weights, each with its own cores."""

    def __init__(
        self,
        config: LlamaConfig,
        packed: native.Config,
        packer: Packer,
        store: KVStore,
        kind: KVFormat,
        threads: int | None = None,
        cores: Sequence[int] | None = None,
        variant: str | None = None,
    ) -> None:
        """`cores` says where each thread may run, the first being the caller's, which is left where it is."""
        found, name = native.library(), native.variant(variant)
        assert found is not None and name is not None
        self.config, self.store, self.variant = config, store, name
        self.threads = threads or default_threads()
        self._library, self._packer, self._packed = found, packer, packed
        self._planes = [_addresses(planes) for planes in (store.keys, store.values)]
        cache = native.Cache(KV_KINDS.index(kind), store.block_tokens, store.blocks, *self._planes)
        pinned = (ctypes.c_int32 * len(cores))(*cores) if cores else None
        self._runner = found.headrace_open(packed, cache, name.encode(), self.threads, pinned)
        self._angles = [_Angles(rope) for rope in dict.fromkeys(rope for rope in config.ropes if rope is not None)]
        self._logits = np.empty((0, 0), np.float32)

    def __del__(self) -> None:
        if runner := getattr(self, "_runner", None):
            self._library.headrace_close(runner)

    @property
    def shape(self) -> ModelShape:
        return self.config.shape

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return (1, 2, 3, *range(ROW_CHUNK, 257, ROW_CHUNK))

    def layers(
        self, spans: Sequence[Rows], first: int, last: int, ids: Sequence[int], x: np.ndarray | None
    ) -> np.ndarray:
        rows = spans[-1].first_row + spans[-1].count
        out = np.empty((rows, self.shape.hidden), np.float32) if x is None else x.copy()
        tokens = np.array(ids, dtype=np.int32)
        described = np.empty((len(spans), 4), dtype=np.int32)
        at = 0
        for index, span in enumerate(spans):
            described[index] = span.first_row, span.start, span.count, at
            at += len(span.blocks)
        blocks = np.concatenate([span.blocks for span in spans])
        self._check(spans, blocks, tokens, out, range(first, last))
        tables = blocks.astype(np.int32)
        shared = np.array([0, *map(shared_tiles, spans, spans[1:], repeat(self.store.block_tokens))], dtype=np.int32)
        longest = max(span.start + span.count for span in spans)
        angles = (ctypes.c_void_p * max(1, len(self._angles)))(*[each.address(longest) for each in self._angles])
        step = native.Step(
            rows, len(spans), first, last, tokens.ctypes.data, out.ctypes.data, described.ctypes.data,
            tables.ctypes.data, ctypes.cast(angles, ctypes.POINTER(ctypes.c_void_p)), shared.ctypes.data,
        )  # fmt: skip
        self._library.headrace_layers(self._runner, step)
        return out

    def logits(
        self, hidden: np.ndarray, rows: np.ndarray, draws: ctypes.Array[native.Draw] | None = None
    ) -> np.ndarray:
        """Of some rows after the last layer: float32 [len(rows), vocab], good until the next call. With `draws`, a
        token is drawn from each at once, and the logits may have changed."""
        if len(self._logits) < len(rows):
            self._logits = np.empty((len(rows), self.shape.vocab), np.float32)
        _within("a row of the last layer", rows, len(hidden))
        asked = rows.astype(np.int32)
        self._library.headrace_logits(
            self._runner, hidden.ctypes.data, asked.ctypes.data, len(rows), self._logits.ctypes.data, draws
        )
        return self._logits[: len(rows)]

    def joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)

    def sample(self, hidden: np.ndarray, chosen: np.ndarray, rows: Sequence[Row]) -> list[Sampled]:
        if reporting(rows) or any(penalties(rows)):  # something is done with the logits before a token is drawn
            return self.drawn(self.logits(hidden, chosen), rows)
        draws = _draws(rows, self.shape.vocab)
        self.logits(hidden, chosen, draws)
        return [Sampled((token,)) for token in numbers([draw.token for draw in draws])]

    def drawn(self, logits: np.ndarray, rows: Sequence[Row]) -> list[Sampled]:
        """A token for every row of logits [R, vocab], which are overwritten; `rows` stay as they are."""
        wanted = reporting(rows)
        raw = dict(zip(wanted, log_softmax(logits[wanted]), strict=True)) if wanted else {}
        penalise(logits, rows)
        return sampled(self.draw(logits, rows), rows, lambda index, token, count: describe(raw[index], token, count))

    def judged(self, hidden: np.ndarray, chosen: np.ndarray, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
        logprobs = log_softmax(self.logits(hidden, chosen))
        return [describe(row, token, count) for row, token in zip(logprobs, tokens, strict=True)]

    def draw(self, logits: np.ndarray, rows: Sequence[Row]) -> list[int]:
        """A token for every row of logits, which may be overwritten."""
        right = logits.shape == (len(rows), self.shape.vocab) and logits.dtype == np.float32
        if not right or not logits.flags.c_contiguous:
            raise OutOfBounds(f"{[*logits.shape]} logits are not {len(rows)} rows of {self.shape.vocab}")
        draws = _draws(rows, self.shape.vocab)
        self._library.headrace_draw(self._runner, logits.ctypes.data, len(rows), draws)
        return numbers([draw.token for draw in draws])

    def _check(
        self, spans: Sequence[Rows], blocks: np.ndarray, tokens: np.ndarray, x: np.ndarray, layers: range
    ) -> None:
        """Everything that native code takes for an index. Raises OutOfBounds."""
        row = 0
        for span in spans:
            if span.first_row != row or not 0 <= span.start < span.start + span.count:
                raise OutOfBounds(
                    f"{span.count} rows from row {span.first_row} and position {span.start} on, not {row}"
                )
            if span.start + span.count > len(span.blocks) * self.store.block_tokens:
                raise OutOfBounds(f"position {span.start + span.count - 1} has no block among {len(span.blocks)}")
            row += span.count
        _within("a block", blocks, self.store.blocks)
        if layers.start:
            wrong = x.shape != (row, self.shape.hidden)
        else:
            wrong = len(tokens) != row
            _within("a token", tokens, self.shape.vocab)
        if wrong or not 0 <= layers.start <= layers.stop <= self.shape.layers:
            raise OutOfBounds(
                f"{row} rows through layers {layers.start} to {layers.stop} begin with {len(tokens)} tokens"
            )

    def times(self) -> Seconds:
        """Since the last call."""
        seconds = (ctypes.c_double * 5)()
        self._library.headrace_times(self._runner, seconds)
        return Seconds(*seconds)


def shared_tiles(before: Rows, span: Rows, block_tokens: int) -> int:
    """Key tiles, all in the past, that two neighbours who decode have in the same blocks: read once for both."""
    if before.count > 1 or span.count > 1 or before.blocks[0] != span.blocks[0]:
        return 0
    common = min(len(before.blocks), len(span.blocks))
    differ = np.flatnonzero(before.blocks[:common] != span.blocks[:common])
    same = int(differ[0]) if len(differ) else common
    return min(same * block_tokens, before.start, span.start) // KEY_TILE


def _within(what: str, indices: np.ndarray, count: int) -> None:
    """Raises OutOfBounds unless all indices are from 0 to count - 1."""
    if len(indices) and not 0 <= indices.min() <= indices.max() < count:
        raise OutOfBounds(f"{what} is {indices.min()} or {indices.max()}; there are {count}")


def _draws(rows: Sequence[Row], vocab: int) -> ctypes.Array[native.Draw]:
    return (native.Draw * len(rows))(*[_draw(row, vocab) for row in rows])


def _draw(row: Row, vocab: int) -> native.Draw:
    s, allowed = row.sampling, row.allowed
    if allowed is not None and (allowed.nbytes * 8 < vocab or not allowed.flags.c_contiguous):
        raise OutOfBounds(f"{allowed.nbytes} bytes of allowed tokens are not {vocab} bits")
    point = uniform(s.seed, row.position) if s.temperature > 0 else 0.0
    bits = None if allowed is None else allowed.ctypes.data
    return native.Draw(s.temperature, point, s.top_p, s.min_p, bits, min(s.top_k, vocab), 0)


class _Angles:
    """cos and sin of every position so far seen, [positions, head_dim]: cos | sin, each head_dim / 2."""

    __slots__ = ("_rope", "_table")

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._table = rope.turns(0, _FIRST_POSITIONS)

    def address(self, positions: int) -> int:
        """Of the table, which covers so many positions from 0 on."""
        while (count := len(self._table)) < positions:
            self._table = np.concatenate((self._table, self._rope.turns(count, 2 * count)))
        return self._table.ctypes.data


def default_threads() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _addresses(planes: Sequence[np.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(planes))(*[plane.ctypes.data for plane in planes])
