"""The block formats of GGUF tensors and how each becomes float32, vectorised over blocks.

A quantised row is a sequence of blocks; a block stores a few scales and small integers. All formats here compute
`scale * q` or `scale * q - minimum` in float32 with one rounding per operation, in the order of the reference, so the
result is the same to the last bit. Layouts follow the ggml block structs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from headrace.device.arrays import BF16, floats

_CHUNK_ELEMENTS = 1 << 20  # dequantise this many at a time, so that intermediates stay in the cache


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A tensor type: `elements` values in `nbytes` bytes. `decode` maps uint8 [n, nbytes] to float32 [n, elements]."""

    name: str
    elements: int
    nbytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def dequantize(data: np.ndarray, block: BlockFormat) -> np.ndarray:
    """uint8 bytes [n * block.nbytes] of whole blocks as float32 [n * block.elements], in a bounded working set."""
    blocks = data.reshape(-1, block.nbytes)
    out = np.empty((len(blocks), block.elements), dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // block.elements)
    with np.errstate(all="ignore"):  # a damaged file may say that a scale is infinite or no number
        for first in range(0, len(blocks), step):
            out[first : first + step] = block.decode(blocks[first : first + step])
    return out.reshape(-1)


def _plain(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: floats(np.ascontiguousarray(blocks).view(dtype))


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _fields(packed: np.ndarray, group: int, bits: int) -> np.ndarray:
    """Unpack `bits`-wide fields: of each run of `group` bytes all lowest fields come first, then the next, ...

    [n, bytes] -> [n, bytes * 8 / bits]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    spread = packed.reshape(len(packed), -1, 1, group) >> shifts
    return (spread & ((1 << bits) - 1)).reshape(len(packed), -1)


def _bits(packed: np.ndarray) -> np.ndarray:
    """The bits of little-endian words in order: [n, bytes] -> [n, bytes * 8]."""
    return _fields(packed, group=1, bits=1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """d: half | 32 nibbles.  d * (q - 8)"""
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 16, 4).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """d, m: half | 32 nibbles.  d * q + m"""
    return _half(blocks, 0) * _fields(blocks[:, 4:], 16, 4).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    """d: half | 32 high bits | 32 nibbles.  d * (q - 16)"""
    q = _fields(blocks[:, 6:], 16, 4) | (_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (q.astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    """d, m: half | 32 high bits | 32 nibbles.  d * q + m"""
    q = _fields(blocks[:, 8:], 16, 4) | (_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """d: half | 32 int8.  q * d"""
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks, 0)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The head of Q4_K and Q5_K: d, dmin: half | 8 six-bit scales and minima in 12 bytes. Both as float32 [n, 8, 1].

    bytes 0-3: scales 0-3 in the low six bits, the top two bits of scales 4-7 above them; bytes 4-7: the same for
    minima; bytes 8-11: the low four bits of scales 4-7 and, above them, of minima 4-7.
    """
    scales, minima, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    sc = np.concatenate([scales & 0x3F, (low & 0x0F) | ((scales >> 2) & 0x30)], axis=1)
    mn = np.concatenate([minima & 0x3F, (low >> 4) | ((minima >> 2) & 0x30)], axis=1)
    d = _half(blocks, 0) * sc.astype(np.float32)
    return d[:, :, None], (_half(blocks, 2) * mn.astype(np.float32))[:, :, None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """head | 256 nibbles, 8 groups of 32.  d * q - m per group"""
    d, m = _scales_and_minima(blocks)
    q = _fields(blocks[:, 16:], 32, 4).reshape(-1, 8, 32)
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    """head | 256 high bits | 256 nibbles, 8 groups of 32.  d * q - m per group"""
    d, m = _scales_and_minima(blocks)
    q = (_fields(blocks[:, 48:], 32, 4) | (_fields(blocks[:, 16:48], 32, 1) << 4)).reshape(-1, 8, 32)
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """256 nibbles | 256 high pairs of bits | 16 int8 scales | d: half.  (d * scale) * (q - 32), 16 groups of 16"""
    q = _fields(blocks[:, :128], 64, 4) | (_fields(blocks[:, 128:192], 32, 2) << 4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    d = (_half(blocks, 208) * scales)[:, :, None]
    return (d * (q.reshape(-1, 16, 16).astype(np.float32) - 32)).reshape(-1, 256)


FORMATS: Mapping[int, BlockFormat] = {  # by the type number in the file
    0: BlockFormat("F32", 1, 4, _plain(np.dtype("<f4"))),
    1: BlockFormat("F16", 1, 2, _plain(np.dtype("<f2"))),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _plain(BF16)),
}

OTHER_FORMATS: Mapping[int, str] = {  # types that exist and are refused by name
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
