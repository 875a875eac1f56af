"""Rotary position embedding: which angle a position turns each pair of a head's dimensions by.

Knows the scaling variants in `KINDS`; owns nothing that changes. The turning is for whoever computes: `rotary` with
torch, or native code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.device.modelfile import BadModelFile

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "factors")


@dataclass(frozen=True, slots=True)
class Rope:
    """One way to turn positions into angles. Equal ropes give equal angles, so layers that agree share the work.

    RoFormer, arXiv:2104.09864: pair i of a head at position p turns by p / theta^(2i/head_dim). The pairs are
    (i, i + head_dim/2), the order of the Hugging Face checkpoints.
    """

    head_dim: int
    theta: float
    original_tokens: int  # context length the frequencies were trained for
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    divisors: tuple[float, ...] = ()  # factors: one per pair, as a GGUF file carries Llama 3 scaling

    @classmethod
    def from_hf(cls, params: Mapping[str, Any], theta: float, head_dim: int, max_positions: int) -> Rope:
        """From `rope_parameters` (or the older `rope_scaling`) of a Hugging Face config; `theta` is for when they
        have none, `max_positions` the context of the config. Raises BadModelFile for what cannot be done."""
        kind = params.get("rope_type") or params.get("type") or "default"
        if kind not in KINDS:
            raise BadModelFile(f"RoPE type {kind!r} is not supported; supported: {', '.join(KINDS)}.")
        if params.get("partial_rotary_factor") not in (None, 1):
            raise BadModelFile("A partial_rotary_factor is not supported: the whole head must be rotated.")
        number = _Numbers(params)
        plain = cls(head_dim, number("rope_theta", theta), max_positions, kind)
        if head_dim % 2 or plain.theta <= 1 or (kind == "dynamic" and head_dim < 4):
            raise BadModelFile(f"RoPE needs an even head_dim and rope_theta > 1, not {head_dim} and {plain.theta}.")
        match kind:
            case "default":
                return plain
            case "linear" | "dynamic":
                return replace(plain, factor=number("factor"))
            case "factors":
                return replace(plain, divisors=_divisors(params.get("factors"), head_dim // 2))
        original = int(number("original_max_position_embeddings", max_positions))
        if not 2 <= original <= 2**24:
            raise BadModelFile(f"original_max_position_embeddings must be from 2 to 2^24, not {original}.")
        plain = replace(plain, original_tokens=original)
        return _with_llama3(plain, number) if kind == "llama3" else _with_yarn(plain, number, max_positions / original)

    def frequencies(self) -> np.ndarray:
        """Radians per position for each pair, [head_dim / 2] in float32. For `dynamic`, those inside the context."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        base = np.power(self.theta, exponents, dtype=np.float64).astype(np.float32)
        match self.kind:
            case "linear":
                return 1.0 / base / self.factor
            case "factors":
                return 1.0 / (base * np.array(self.divisors, dtype=np.float32))
            case "llama3":
                return _llama3_frequencies(self, 1.0 / base)
            case "yarn":
                return _yarn_frequencies(self, base)
            case _:
                return 1.0 / base

    def turns(self, first: int, last: int) -> np.ndarray:
        """What turns rows at positions first, ..., last - 1: float32 [last - first, head_dim], cos | sin."""
        positions = np.arange(first, last)
        angles = positions[:, None].astype(np.float32) * self.frequencies()
        if self.kind == "dynamic" and last > self.original_tokens:
            grown = positions[:, None].astype(np.float32) * self.frequencies_at(positions)
            angles = np.where(positions[:, None] >= self.original_tokens, grown, angles)
        return np.concatenate((np.cos(angles), np.sin(angles)), -1) * np.float32(self.attention_factor)

    def frequencies_at(self, positions: np.ndarray) -> np.ndarray:
        """NTK-aware frequencies of `dynamic`, [T, head_dim / 2], of positions [T] beyond the trained context.

        NTK scaling makes the base a function of the sequence length n:
            theta * (factor * n / original - (factor - 1)) ^ (dim / (dim - 2)).
        transformers takes for n the longest sequence of the batch, so the answer depends on the neighbours and on how a
        prompt was cut. Here position p takes n = p + 1, its own sequence so far. Inside the trained context both are
        the plain RoPE; beyond it this is what token-by-token generation computes, and cached keys never become stale.
        """
        dim = self.head_dim
        grown = self.factor * (positions.astype(np.float64) + 1) / self.original_tokens - (self.factor - 1)
        log_base = math.log(self.theta) + np.log(np.maximum(grown, 1.0)) * (dim / (dim - 2))
        exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
        return np.exp(-log_base[:, None] * exponents).astype(np.float32)


class _Numbers:
    """Reads positive finite numbers from an untrusted mapping, by name."""

    __slots__ = ("params",)

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params

    def __call__(self, name: str, default: float | None = None) -> float:
        value = self.params.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
            raise BadModelFile(f"RoPE parameter {name} must be a positive number, not {value!r}.")
        return float(value)


def _divisors(given: object, pairs: int) -> tuple[float, ...]:
    if not isinstance(given, list | tuple) or len(given) != pairs:
        raise BadModelFile(f"RoPE factors must be a list of {pairs} positive numbers.")
    each = [_Numbers({"factors": value})("factors") for value in given]
    return tuple(each)


def _with_llama3(rope: Rope, number: _Numbers) -> Rope:
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if low >= high:
        raise BadModelFile(f"RoPE needs low_freq_factor below high_freq_factor, not {low} and {high}.")
    return replace(rope, factor=number("factor"), low_freq_factor=low, high_freq_factor=high)


def _with_yarn(rope: Rope, number: _Numbers, stretch: float) -> Rope:
    factor = number("factor", stretch)
    return replace(
        rope,
        factor=factor,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=number.params.get("truncate", True) is not False,
        attention_factor=_yarn_attention_factor(number, factor),
    )


def _llama3_frequencies(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    turns = rope.original_tokens / (2 * math.pi / frequencies)  # of each pair within the trained context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clip(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn_frequencies(rope: Rope, base: np.ndarray) -> np.ndarray:
    """YaRN, arXiv:2309.00071: interpolate pairs of few turns, keep pairs of many, a linear ramp between."""

    def pair_of(turns: float) -> float:
        return rope.head_dim * math.log(rope.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # the ramp is a step
    ramp = ((np.arange(rope.head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    return ramp / (rope.factor * base) + (1 - ramp) / base


def _yarn_attention_factor(number: _Numbers, factor: float) -> float:
    """What cos and sin are multiplied by: as given, or as the paper derives it from the factor."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = number.params
    if given.get("attention_factor") is not None:
        return number("attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(number("mscale")) / scale(number("mscale_all_dim"))
    return scale(1.0)
