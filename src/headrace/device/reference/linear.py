"""Linear layers: packs a weight for the device's fastest kernel and keeps results independent of the batch.

A request's tokens must not depend on who else is in its step, yet a matrix library may sum in another order when the
number of rows changes. So rows come in a few fixed sizes (`ROWS`), and on a CPU every packed weight shape is checked
at load: the sizes that give bit-identical rows are the ones used, and a step is padded up to one of them. Few sizes
also mean few kernels to compile and cache.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

Apply = Callable[[Tensor], Tensor]

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # row counts a kernel is ever called with
_WIDE = 4  # outputs per input from which the packed kernel wins by a third or more
_HEAD = 16384  # outputs that only an output head has
_CHAIN = 288  # inputs added up in one chain
_CHECKED_MULTIPLIES = 2**31  # rows times weights of the largest trial call


class Linears:
    """Packs weights and remembers which row counts are exact for all of them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.nbytes = 0
        self.rows: tuple[int, ...] = ROWS
        self._exact: dict[tuple[int, int], tuple[int, ...]] = {}

    def pack(self, weight: Tensor, bias: Tensor | None) -> Apply:
        """`weight` [out, in], `bias` [out] -> a function from x [T, in] to [T, out]; T as `padded` gives it.
        The weight passed in may be freed."""
        weight = weight.to(self.device, self.dtype)
        bias = bias.to(self.device, self.dtype) if bias is not None else None
        self.nbytes += weight.nbytes + (bias.nbytes if bias is not None else 0)
        if self.device.type != "cpu":
            return _plain(weight, bias)
        apply = _packed(weight, bias)
        exact = self._check(apply, (weight.shape[0], weight.shape[1]))
        self.rows = tuple(rows for rows in self.rows if set(_slices(rows, exact[-1])) <= set(exact))
        return _in_slices(apply, exact[-1])

    def padded(self, rows: int) -> int:
        """The smallest row count at least `rows` that every packed weight computes exactly."""
        largest = self.rows[-1]
        if rows > largest:
            return -(-rows // largest) * largest
        return self.rows[bisect_left(self.rows, rows)]

    def _check(self, apply: Apply, shape: tuple[int, int]) -> tuple[int, ...]:
        """Exact row counts of one weight shape, tried once; large weights with fewer rows, to stay near 0.1 s."""
        if shape not in self._exact:
            affordable = max(16, 2 ** int(math.log2(_CHECKED_MULTIPLIES / (shape[0] * shape[1]))))
            candidates = [rows for rows in ROWS if rows <= affordable]
            self._exact[shape] = exact_rows(apply, shape[1], self.dtype, candidates)
        return self._exact[shape]


def _slices(rows: int, largest: int) -> list[int]:
    """The calls that `rows` rows become when one call takes at most `largest`."""
    return [largest] * (rows // largest) + ([rows % largest] if rows % largest else [])


def _in_slices(apply: Apply, largest: int) -> Apply:
    return lambda x: apply(x) if len(x) <= largest else torch.cat([apply(part) for part in x.split(largest)])


def exact_rows(apply: Apply, width: int, dtype: torch.dtype, candidates: Sequence[int] = ROWS) -> tuple[int, ...]:
    """The row counts among `candidates` whose rows agree bit for bit, by trying; the largest agreeing group.

    Every size is tried on the same random rows at the start and at the end of the largest size, so a kernel that
    treats its last rows differently is caught too.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(candidates[-1], width, generator=generator).to(dtype)
    results = {rows: torch.cat([apply(x[:rows].contiguous()), apply(x[-rows:].contiguous())]) for rows in candidates}
    groups: list[list[int]] = []
    for rows in reversed(candidates):  # the largest sizes carry the most work: prefer groups that hold them
        for group in groups:
            if _agree(results[group[0]], group[0], results[rows], rows):
                group.append(rows)
                break
        else:
            groups.append([rows])
    return tuple(reversed(sorted(groups, key=len)[-1]))


def _agree(large: Tensor, large_rows: int, small: Tensor, small_rows: int) -> bool:
    """Whether a smaller call gave the same bits as the first and the last rows of a larger one."""
    first, last = large[:large_rows], large[large_rows:]
    return torch.equal(first[:small_rows], small[:small_rows]) and torch.equal(last[-small_rows:], small[small_rows:])


def _plain(weight: Tensor, bias: Tensor | None) -> Apply:
    return lambda x: functional.linear(x, weight, bias)


def _packed(weight: Tensor, bias: Tensor | None) -> Apply:
    """The faster of two CPU kernels where it is precise enough.

    oneDNN's packed kernel adds up the inner dimension in one chain and errs about twice as much as MKL's blocked sums.
    Over thirty layers that adds up to more than the 1e-4 we allow against transformers, so in fp32 it computes what
    is much wider than it is deep, in shorter chains, and the output head, one product only (docs/LOG.md).
    """
    outputs, inputs = weight.shape
    if not can_pack(weight.dtype) or (weight.dtype == torch.float32 and outputs < _WIDE * inputs):
        return _plain(weight, bias)
    if weight.dtype != torch.float32 or outputs >= _HEAD:
        return _chained(weight, bias, inputs)
    return _chained(weight, bias, _CHAIN)


def _chained(weight: Tensor, bias: Tensor | None, chain: int) -> Apply:
    """oneDNN's packed kernel on stretches of at most `chain` inputs, added up."""
    parts = -(-weight.shape[1] // chain)
    ends = [weight.shape[1] * part // parts for part in range(parts + 1)]
    packed = [
        (first, last, torch.ops.mkldnn._reorder_linear_weight(weight[:, first:last].contiguous()))
        for first, last in pairwise(ends)
    ]
    linear = torch.ops.mkldnn._linear_pointwise

    def apply(x: Tensor) -> Tensor:
        out: Tensor | None = None
        for first, last, part in packed:
            if out is None:
                out = linear(x[:, first:last], part, bias, "none", [], "")
            else:
                out = linear.binary(x[:, first:last], out, part, None, "add")
        assert out is not None
        return out

    return apply


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed kernel multiplies this type here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
