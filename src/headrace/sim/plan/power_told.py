"""What `plan power` found, in words. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from headrace.draw.text import short, three
from headrace.sim.plan.answer import Answer, Part
from headrace.sim.plan.power import LOSSES, PEAK_SHARE, More, Power


def answer(found: Power, subject: str, seconds: float) -> Answer:
    return Answer(
        f"Power of {subject}",
        tuple(_headline(found)),
        (
            Part(
                "More servers under the same budget",
                "Latencies against the same servers without caps; half of the servers have low priority.",
                [_heads(), *map(_row, found.more)],
            ),
            Part(
                "Clocks, one server with full steps",
                "Arithmetic slows with the clock, memory does not.",
                _clocks(found),
            ),
        ),
        tuple(f"{one.servers} servers ({one.share:+.0%}): {', '.join(one.broken)}" for one in found.more if one.broken),
        tuple(_sure(found)),
        tuple(_work(found, seconds)),
        {
            "budget_w": found.budget_w,
            "servers": found.servers,
            "fitting": found.fitting and {**asdict(found.fitting), "losses": found.fitting.losses},
            "more": [{**asdict(one), "losses": one.losses, "broken": one.broken} for one in found.more],
            "clocks": [asdict(one) for one in found.clocks],
            "ten_percent_off": {name: one.broken for name, one in found.swings},
        },
    )


def _headline(found: Power) -> Iterator[str]:
    best, base = found.fitting, found.base
    if best is None:
        yield f"NOT ONE MORE: even the smallest number of servers above {found.servers} breaks a promise."
    else:
        more = best.servers - found.servers
        yield (
            f"{more} MORE SERVERS ({best.share:+.0%}) fit under the budget of {found.servers}, without a brake and "
            f"with latencies kept."
        )
        yield (
            f"  Uncapped they would draw up to {best.free.peak_share:.0%} of it; caps were on {best.held.capped:.0%} "
            f"of the time."
        )
    yield (
        f"  As provisioned the row draws at most {base.peak_w / 1e3:,.1f} kW of {found.budget_w / 1e3:,.1f} kW: "
        f"{base.joules_per_token:.3g} J a token, {base.joules_per_request:,.0f} J a request."
    )


def _heads() -> list[str]:
    return ["servers", "uncapped peak", "capped peak", "brakes", *LOSSES, "J/token", "fits"]


def _row(one: More) -> list[str]:
    return [
        f"{one.servers} ({one.share:+.0%})",
        f"{one.free.peak_share:.0%}",
        f"{one.held.peak_share:.0%}",
        f"{one.held.brakes}",
        *(f"{lost:+.1%}" for lost in one.losses),
        f"{one.held.joules_per_token:.3g}",
        "no" if one.broken else "yes",
    ]


def _clocks(found: Power) -> list[list[str]]:
    rows = [["clock, MHz of an A100", "tokens/s", "W a server", "J/token", "J/request"]]
    each = (
        (one.mhz, short(three(one.tokens_per_s)), one.watts, one.joules_per_token, one.joules_per_request)
        for one in found.clocks
    )
    return rows + [
        [f"{mhz:.0f}", pace, f"{w:,.0f}", f"{token:.3g}", f"{whole:,.0f}"] for mhz, pace, w, token, whole in each
    ]


def _sure(found: Power) -> Iterator[str]:
    yield "Power follows from the use of each unit (GenZ's shares of the catalogue's maximum); nothing was metered."
    yield f"That a provisioned row peaks at {PEAK_SHARE:.0%}, a fifth less power at 1110 MHz: POLCA, for A100."
    for name, one in found.swings:
        yield f"{name}: {'still fits' if not one.broken else 'NO LONGER FITS: ' + ', '.join(one.broken)}"


def _work(found: Power, seconds: float) -> Iterator[str]:
    yield f"load rises from half to the peak in {seconds / 2:g} s and stays for {seconds / 2:g} s; ticks of 2 s"
    yield f"budget = peak of the row as provisioned / {PEAK_SHARE} = {found.base.peak_w:,.0f} / {PEAK_SHARE} W"
    yield "caps: > 0.80 low 1275, > 0.89 low 1110, still > 0.89 high 1305, > 1 brake; off 0.05 below; 40 s late"
    yield "seconds at a clock = memory + network + overhead + compute x 1410 / MHz"
    yield "watts at a clock = static + (drawn - static) x (MHz / 1410)^1.7, plus the rest of the server"
