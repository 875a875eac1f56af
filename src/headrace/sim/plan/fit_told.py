"""What fits, in words and numbers: a table for the terminal, JSON for a program. Decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from headrace.draw.text import aligned, short, three
from headrace.sim.plan.answer import Answer, Part
from headrace.sim.plan.answer import html as page_of
from headrace.sim.plan.fit import Fit

KNOWN = {
    "shape": "from the model's shape",
    "catalogue": "from the device's data sheet",
    "assumed": "an estimate",
}


def told(fit: Fit, show_work: bool) -> str:
    """For the terminal."""
    lines = [fit.subject, ""]
    lines += _worked(fit) if show_work else aligned([(f"  {one.name}", one.shown) for one in fit.numbers], "<<")
    lines += ["", *aligned(list(_speeds(fit)), "<>>>>>"), "", *aligned(list(_long(fit)), ">>>>>"), ""]
    if fit.streamed:
        lines.append(
            f"  weights kept in the host's memory: at most {short(three(fit.streamed.tokens_per_s))} tokens/s, "
            f"{fit.streamed.bound} bound (MoE-Lens: min(PME x KV tokens / seconds of one sweep, device))"
        )
    lines += [f"  note: {note}" for note in fit.notes]
    lines += ["", *_sure(fit)]
    return "\n".join(lines) + "\n"


def _worked(fit: Fit) -> Iterator[str]:
    for one in fit.numbers:
        yield f"  {one.name}: {one.shown}"
        yield f"      = {one.formula}"
        yield f"      = {one.worked}    ({KNOWN[one.known]})"
    yield "  speeds: step = sum of max(FLOPs / peak, bytes / bandwidth) over operators + collectives + launches + host"
    yield "      served = N x answer / (N x prefill of a prompt + answer x step of N), energy likewise"


def _speeds(fit: Fit) -> Iterator[tuple[str, ...]]:
    yield "  requests side by side", "ms/token", "tokens/s decoding", "tokens/s with prompts", "limit", "J/token"
    for one in fit.speeds:
        yield (
            f"  {one.requests:,}",
            f"{1e3 * one.token_s:.1f}",
            short(three(one.tokens_per_s)),
            short(three(one.served_per_s)),
            one.bound,
            f"{one.joules_per_token:.3g}" if one.joules_per_token else "-",
        )


def _long(fit: Fit) -> Iterator[tuple[str, ...]]:
    yield "  contexts of", "users", "prefill s", "ms/token alone", "swap s"
    for one in fit.long:
        swap = "-" if one.switch_s is None else f"{one.switch_s:.2f}"
        yield f"  {one.tokens:,}", f"{one.users:,}", f"{one.prefill_s:.2f}", f"{1e3 * one.decode_s:.1f}", swap


def _sure(fit: Fit) -> Iterator[str]:
    moved = ", ".join(f"{one.of}: {one.served - 1:+.1%}" for one in fit.swings)
    yield "  sure: bytes, from the shape. Catalogue: memory, peaks. Assumed: shares of peaks that kernels reach, host"
    yield f"  tokens/s of the largest batch if the {moved}"
    yield "  contexts are at full peaks; nothing here was measured: `headrace calibrate` measures your machine"


def html(fit: Fit) -> str:
    """A page that needs nothing else."""
    numbers = [["number", "value"], *([one.name, one.shown] for one in fit.numbers)]
    parts = (
        Part("What fits", "Memory follows from the shape.", numbers),
        Part("How fast it would be", "By the cost model at catalogue peaks.", [*map(list, _speeds(fit))]),
        Part("Long contexts", "At full peaks (arXiv:2405.08944).", [*map(list, _long(fit))]),
    )
    title = f"Does it fit? {fit.subject}"
    return page_of(Answer(title, [fit.subject], parts, list(fit.notes), [*_sure(fit)], [*_worked(fit)], {}))


def as_json(fit: Fit) -> str:
    """All of it, for a program."""
    return json.dumps(asdict(fit), indent=2, allow_nan=False) + "\n"
