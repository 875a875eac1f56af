"""The compiled kernels as Python sees them: where they are, which variant this machine runs, structures and signatures.

The structures mirror `layout.h` field by field. Owns nothing; the absence of the library is an answer, not an error.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

VARIANTS = ("avx512bf16", "avx512", "avx2", "portable")  # best first; `portable` runs anywhere, and slower than torch


class Matrix(Structure):
    _fields_ = (("format", c_int32), ("outputs", c_int32), ("inputs", c_int32), ("unused", c_int32),
                ("panels", c_void_p), ("bias", c_void_p))  # fmt: skip


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("before_attention", "after_attention", "before_ffn", "after_ffn")),
        ("head_norms", c_void_p), ("rope", c_int32), ("window", c_int32),
    )  # fmt: skip


class Config(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")),
        ("activation", c_int32), ("norm_eps", c_float), ("attention_scale", c_float), ("embedding_scale", c_float),
        ("unused", c_int32), ("layer", POINTER(Layer)), ("embedding", Matrix), ("head", Matrix), ("norm", c_void_p),
    )  # fmt: skip


class Draw(Structure):
    _fields_ = (("temperature", c_float), ("point", c_float), ("top_p", c_double), ("min_p", c_double),
                ("allowed", c_void_p), ("top_k", c_int32), ("token", c_int32))  # fmt: skip


class Cache(Structure):
    _fields_ = (("kind", c_int32), ("block_tokens", c_int32), ("blocks", c_int64),
                ("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p)))  # fmt: skip


class Step(Structure):
    _fields_ = (("rows", c_int32), ("spans", c_int32), ("first", c_int32), ("last", c_int32), ("ids", c_void_p),
                ("x", c_void_p), ("span", c_void_p), ("tables", c_void_p), ("angles", POINTER(c_void_p)),
                ("shared", c_void_p))  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The library beside this file; None where it was not built."""
    for path in sorted(Path(__file__).parent.glob("kernels.*")):
        if path.suffix in (".so", ".dylib", ".pyd"):
            try:
                return _declared(ctypes.CDLL(str(path)))
            except (OSError, AttributeError):  # built for another machine, or from older sources
                continue
    return None


def variant(name: str | None = None) -> str | None:
    """The best variant that this machine runs, or the named one if it does; None if there is none."""
    found = library()
    answer = found.headrace_variant(name.encode() if name else None) if found is not None else None
    return answer.decode() if answer else None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    signatures = {
        "headrace_variant": (c_char_p, [c_char_p]),
        "headrace_open": (c_void_p, [POINTER(Config), POINTER(Cache), c_char_p, c_int32, c_void_p]),
        "headrace_close": (None, [c_void_p]),
        "headrace_layers": (None, [c_void_p, POINTER(Step)]),
        "headrace_logits": (None, [c_void_p, c_void_p, c_void_p, c_int32, c_void_p, POINTER(Draw)]),
        "headrace_draw": (None, [c_void_p, c_void_p, c_int32, POINTER(Draw)]),
        "headrace_times": (None, [c_void_p, POINTER(c_double)]),
        "headrace_packed_bytes": (c_int64, [c_int32, c_int64, c_int64]),
        "headrace_pack": (None, [c_int32, c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
