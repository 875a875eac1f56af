"""Tables of measured throughputs and market files read into a mix's question; its answer in words. Decides nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headrace.core.config import BadSetting
from headrace.draw.text import aligned, short, three
from headrace.sim.plan.answer import Answer, Part
from headrace.sim.plan.answer import html as page_of
from headrace.sim.plan.fleet_mix import Confirmed
from headrace.sim.plan.fleet_mix import told as named
from headrace.sim.plan.mix import Bucket, Mix, Type, single
from headrace.sim.scenario import parse_hardware


def table(content: Any) -> tuple[list[Type], list[Bucket], int]:
    """(types, buckets, slices) of Mélange's input: gpu_info with cost and tputs, workload_distribution,
    total_request_rate, slice_factor. Raises BadSetting."""
    try:
        gpus, shares = content["gpu_info"], content["workload_distribution"]
        rate, slices = float(content["total_request_rate"]), int(content.get("slice_factor", 1))
        types = [Type(str(name), _number(one["cost"]), one.get("available")) for name, one in gpus.items()]
        buckets = [
            Bucket(
                f"({row}, {column})",
                rate * _number(share),
                tuple(_number(one["tputs"][row][column]) for one in gpus.values()),
            )
            for row, line in enumerate(shares)
            for column, share in enumerate(line)
            if share
        ]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadSetting(
            "the table is not Mélange's: gpu_info {NAME: {cost, tputs}}, workload_distribution, total_request_rate"
        ) from error
    if not 1 <= slices <= 64 or not 0 < rate < 1e9:
        raise BadSetting("the table's slice_factor must be 1 to 64 and its total_request_rate above 0")
    return types, buckets, slices


def types(names: Sequence[str], market: Mapping[str, Any]) -> list[Type]:
    """What a replica of such hardware costs and how many there are; the market's numbers are of devices. Raises
    BadSetting for one whose price nobody knows."""
    prices, there = ({str(k).lower(): v for k, v in market.get(t, {}).items()} for t in ("usd_per_hour", "available"))
    found = []
    for name in names:
        topology = parse_hardware(name)
        chip = topology.device
        price = prices.get(chip.name.lower(), chip.usd_per_hour)
        if price is None:
            raise BadSetting(f"nobody knows what {chip.name} costs; say so in --market FILE under [usd_per_hour]")
        devices = there.get(chip.name.lower())
        if devices is not None and not (isinstance(devices, int) and 0 <= devices <= 1_000_000):
            raise BadSetting(f"{devices!r} {chip.name} are available; that must be a number from 0 to 1000000")
        count = None if devices is None else devices // topology.devices
        found.append(Type(name, _number(price) * topology.devices, count))
    return found


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise BadSetting(f"{value!r} is not a price or a rate of 0 or more")
    return float(value)


def told(mix: Mix, buckets: Sequence[Bucket]) -> str:
    """For the terminal."""
    lines = [f"CHEAPEST: {named(mix)} for ${mix.usd_per_hour:,.2f} an hour.", ""]
    lines += aligned(list(_types(mix)), "<>>>>")
    lines += ["", *_singles(mix, buckets), "", *aligned(list(_buckets(mix, buckets)), "<>" + "<" * 1)]
    return "\n".join(lines) + "\n"


def confirmed(found: Confirmed) -> str:
    """With what the simulation said."""
    first, mix = found.packed, found.mix
    lines = [told(mix, found.buckets)]
    lines.append(f"Simulated: {found.kept:.2%} of the requests keep every promise.")
    if found.slack > 1:
        lines.append(
            f"Packing alone would say {named(first)} for ${first.usd_per_hour:,.2f}: it keeps {found.packed_kept:.2%}, "
            f"as it knows no queues. Every request counts {found.slack:.2f} times here."
        )
    lines.append(
        "Throughputs are those of the cost model at catalogue peaks; prices are planning constants, no quotes."
    )
    return "\n".join(lines) + "\n"


def _types(mix: Mix) -> Iterator[tuple[str, ...]]:
    yield "  type", "count", "$/h each", "$/h", "used"
    for one, count, load in zip(mix.types, mix.counts, mix.loads, strict=True):
        used = f"{load / count:.0%}" if count else "-"
        yield f"  {one.name}", str(count), f"{one.usd_per_hour:.2f}", f"{count * one.usd_per_hour:,.2f}", used


def _singles(mix: Mix, buckets: Sequence[Bucket]) -> Iterator[str]:
    for kind, one in enumerate(mix.types):
        count = single(kind, mix.types, buckets)
        if count is None:
            yield f"  {one.name} alone: cannot keep the promises for every size"
        else:
            cost = count * one.usd_per_hour
            yield f"  {one.name} alone: {count}, ${cost:,.2f} an hour ({cost / mix.usd_per_hour - 1:+.0%})"


def _buckets(mix: Mix, buckets: Sequence[Bucket]) -> Iterator[tuple[str, ...]]:
    yield "  size", "requests/s", "goes to"
    for at, bucket in enumerate(buckets):
        shares = [(one.name, mix.share(at, kind)) for kind, one in enumerate(mix.types)]
        where = ", ".join(f"{name} {share:.0%}" for name, share in shares if share)
        yield f"  {bucket.name}", short(three(bucket.rate)), where


def html(mix: Mix, buckets: Sequence[Bucket], said: str) -> str:
    """A page that needs nothing else; `said` is what the terminal gets."""
    parts = (
        Part("Devices", "How many of each, and how much of them is used.", [*map(list, _types(mix))]),
        Part("Requests", "Which sizes go where.", [*map(list, _buckets(mix, buckets))]),
    )
    sure = [line for line in said.splitlines() if line.startswith(("Simulated", "Packing", "Throughputs"))]
    first = f"CHEAPEST: {named(mix)} for ${mix.usd_per_hour:,.2f} an hour."
    return page_of(Answer("The cheapest mix", [first], parts, [*_singles(mix, buckets)], sure, [], {}))


def as_json(mix: Mix, buckets: Sequence[Bucket]) -> str:
    """For a program."""
    counts = {one.name: count for one, count in zip(mix.types, mix.counts, strict=True)}
    rows = [
        {"size": bucket.name, "rate": bucket.rate, "slices": mix.slices[at], "most": bucket.most}
        for at, bucket in enumerate(buckets)
    ]
    return json.dumps({"usd_per_hour": mix.usd_per_hour, "counts": counts, "buckets": rows}, indent=2) + "\n"
