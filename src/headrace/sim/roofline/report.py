"""Limits beside what was reached: as a value, as a table for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.core.config import format_bytes
from headrace.draw.text import aligned, short, three
from headrace.sim.hardware import Device
from headrace.sim.roofline.limits import Limit, Stored
from headrace.sim.roofline.parts import PARTS, Reached

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode step: what it takes at least, and what it took, if it was measured."""

    limit: Limit
    reached: Reached | None

    @property
    def tokens_per_s(self) -> float | None:
        return self.limit.rows / self.reached.seconds if self.reached else None

    @property
    def share(self) -> float | None:
        """Of the limit."""
        return self.limit.seconds / self.reached.seconds if self.reached else None

    def lost(self) -> list[tuple[str, float]]:
        """(part, seconds above its limit), the most first."""
        if self.reached is None:
            return []
        above = [(name, self.reached.parts[name] - self.limit.parts.get(name, 0.0)) for name in PARTS]
        return sorted(above, key=lambda pair: -pair[1])


@dataclass(frozen=True, slots=True)
class Prefill:
    limit: Limit
    seconds: float | None

    @property
    def tokens_per_s(self) -> float | None:
        return self.limit.tokens / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Roofline:
    """One model on one machine."""

    model: str
    threads: int
    device: Device
    cache_bytes_per_s: float
    stored: Stored
    decodes: tuple[Decode, ...]
    prefills: tuple[Prefill, ...]


def table(found: Roofline) -> str:
    """For the terminal."""
    lines = [f"{found.model}, weights {found.stored.weights}, KV {found.stored.kv}, {machine(found)}", ""]
    lines += aligned([(f"  {name}", value) for name, value in peaks(found)], "<>")
    lines += ["", *aligned([(f"  {row[0]}", *row[1:]) for row in decode_rows(found)], ">>>>>>")]
    if found.prefills:
        lines += ["", *aligned([(f"  {row[0]}", *row[1:]) for row in prefill_rows(found)], ">>>>>")]
    parts = part_rows(found)
    if len(parts) > 1:
        lines += ["", "  milliseconds of a decode step, in brackets those of the limit; the largest loss last"]
        lines += aligned([(f"  {row[0]}", *row[1:]) for row in parts], ">>" + ">" * len(PARTS) + "<")
    return "\n".join(lines) + "\n"


def machine(found: Roofline) -> str:
    return f"{found.threads} threads of {found.device.name}"


def peaks(found: Roofline) -> list[tuple[str, str]]:
    """(what, how much) the machine was seen doing at most, and what a step asks of it."""
    chip = found.device
    rates = (("fp32", chip.fp32_flops_per_s), ("bf16", chip.bf16_flops_per_s), ("int8", chip.int8_flops_per_s))
    return [
        ("memory is read at", f"{chip.memory_bytes_per_s / 1e9:,.1f} GB/s"),
        ("a cache is read at", f"{found.cache_bytes_per_s / 1e9:,.1f} GB/s"),
        *((f"{name} is multiplied at", f"{rate / 1e9:,.0f} GFLOP/s" if rate else "-") for name, rate in rates),
        ("weights that a step reads", format_bytes(found.stored.weight_bytes)),
        ("KV of one token", format_bytes(found.stored.kv_bytes_per_token)),
    ]


def decode_rows(found: Roofline) -> list[list[str]]:
    rows = [["requests", "context", "limit tokens/s", "bound by", "reached", "of the limit"]]
    for one in found.decodes:
        limit = one.limit
        rows.append(
            [
                short(limit.rows),
                short(limit.context),
                _rate(limit.tokens_per_s),
                limit.bound,
                _rate(one.tokens_per_s),
                f"{one.share:.0%}" if one.share else "-",
            ]
        )
    return rows


def prefill_rows(found: Roofline) -> list[list[str]]:
    rows = [["prompt", "limit tokens/s", "bound by", "reached", "of the limit"]]
    for one in found.prefills:
        share = f"{one.limit.seconds / one.seconds:.0%}" if one.seconds else "-"
        limit = one.limit
        rows.append([short(limit.tokens), _rate(limit.tokens_per_s), limit.bound, _rate(one.tokens_per_s), share])
    return rows


def part_rows(found: Roofline) -> list[list[str]]:
    """Where the time of measured steps goes."""
    rows = [["requests", "context", *PARTS, "lost most to"]]
    for one in found.decodes:
        if one.reached is None:
            continue
        cells = [_spent(one.reached.parts[name], one.limit.parts.get(name)) for name in PARTS]
        (name, seconds), *_ = one.lost()
        blame = f"{name}: {seconds / one.reached.seconds:.0%} of the step"
        rows.append([short(one.limit.rows), short(one.limit.context), *cells, blame])
    return rows


def to_json(found: Roofline) -> dict[str, Any]:
    """Seconds, bytes and operations; names as in the table."""
    chip, stored = found.device, found.stored
    return {
        "schema": SCHEMA,
        "model": found.model,
        "weights": stored.weights,
        "kv": stored.kv,
        "weight_bytes": stored.weight_bytes,
        "kv_bytes_per_token": stored.kv_bytes_per_token,
        "device": chip.name,
        "threads": found.threads,
        "memory_bytes_per_s": chip.memory_bytes_per_s,
        "cache_bytes_per_s": found.cache_bytes_per_s,
        "flops_per_s": {"fp32": chip.fp32_flops_per_s, "bf16": chip.bf16_flops_per_s, "int8": chip.int8_flops_per_s},
        "decode": [_decode_json(one) for one in found.decodes],
        "prefill": [
            {
                "tokens": one.limit.tokens,
                "limit_s": one.limit.seconds,
                "bound": one.limit.bound,
                "reached_s": one.seconds,
            }
            for one in found.prefills
        ],
    }


def _decode_json(one: Decode) -> Mapping[str, Any]:
    return {
        "rows": one.limit.rows,
        "context": one.limit.context,
        "limit_s": one.limit.seconds,
        "bound": one.limit.bound,
        "limit_parts_s": dict(one.limit.parts),
        "reached_s": one.reached.seconds if one.reached else None,
        "reached_parts_s": dict(one.reached.parts) if one.reached else None,
    }


def _rate(value: float | None) -> str:
    return "-" if value is None else short(three(value))


def _spent(seconds: float, least_s: float | None) -> str:
    return f"{1e3 * seconds:.2f}" + (f" ({1e3 * least_s:.2f})" if least_s is not None else "")


def joined(limits: Sequence[Limit], reached: Sequence[Reached]) -> tuple[Decode, ...]:
    """Each limit with the measurement of the same step."""
    measured = {(one.rows, one.context): one for one in reached}
    return tuple(Decode(limit, measured.get((limit.rows, limit.context))) for limit in limits)
