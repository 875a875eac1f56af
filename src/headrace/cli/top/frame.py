"""One frame of `headrace top` as lines of coloured text. Pure: a snapshot and a size in, lines out.

Whatever came from the server is stripped of control characters, so nothing it says can steer the terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from headrace.cli.top.source import Memory, Request, Snapshot, Step, Steps

_RATE_OVER_S = 5.0
_TOLD_MS = 100.0  # shorter waits need no reason in the table
_BARS = " ▁▂▃▄▅▆▇█"
_COLOURS = {
    "": "",
    "dim": "2",
    "bold": "1",
    "chosen": "7",
    "decode": "34",
    "prefill": "33",
    "cached": "36",
    "bad": "31",
}
_STATES = {"waiting": ("waits", "dim"), "prefilling": ("reads", "prefill"), "decoding": ("writes", "decode")}
_HEADS = ("REQUEST", "TENANT", "STATE", "AGE", "QUEUE", "FIRST", "PROMPT", "OUTPUT", "WAITED FOR")
_WAITED = len("prompts of other requests")


@dataclass(frozen=True, slots=True)
class Size:
    columns: int
    rows: int | None  # None: as many as there are


@dataclass(frozen=True, slots=True)
class Line:
    """Pieces of text, each in a colour."""

    pieces: tuple[tuple[str, str], ...]

    def text(self, colours: bool) -> str:
        if not colours:
            return "".join(text for text, _ in self.pieces).rstrip()
        return "".join(f"\x1b[{_COLOURS[how]}m{text}\x1b[0m" if how else text for text, how in self.pieces)


def line(*pieces: str | tuple[str, str]) -> Line:
    return Line(tuple((piece, "") if isinstance(piece, str) else piece for piece in pieces))


_YOURS = line(("The requests of your tenant; the whole server is shown to an admin's key.", "dim"))


def overview(now: Snapshot, size: Size, chosen: str | None) -> list[Line]:
    """The whole server. `chosen` is the id of a request."""
    head = [
        line(("Headrace", "bold"), "  ", (plain(now.url), "dim")),
        _figures(now),
        *(_whole(now.steps, size.columns) if now.steps else [_YOURS]),
        line(),
    ]
    rows = None if size.rows is None else max(1, size.rows - len(head) - 2)
    return [*head, *_table(now.requests, size.columns, rows, chosen)]


def explanation(request_id: str, sentences: Sequence[str], size: Size) -> list[Line]:
    """Why one request took as long as it did."""
    lines = [line((plain(request_id), "bold")), line()]
    for sentence in sentences:
        wrapped = textwrap.wrap(plain(sentence), max(20, size.columns - 4), subsequent_indent="  ")
        lines += [line("  " + part) for part in wrapped]
    return lines if size.rows is None else lines[: size.rows - 1]


def plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def duration(ms: float | None) -> str:
    """4.2 as '4.2 ms', 83000 as '1m23s'."""
    if ms is None:
        return "-"
    if ms < 1000:
        return f"{ms:.0f} ms" if ms >= 10 or ms == 0 else f"{ms:.1f} ms"
    if ms < 60_000:
        return f"{ms / 1000:.{2 if ms < 10_000 else 1}f} s"
    minutes, rest = divmod(round(ms / 1000), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def rate(steps: Iterable[Step], now: float, tokens: Callable[[Step], int]) -> float:
    """Tokens a second over the last seconds; of a run of steps that began before, the part within."""
    since = now - _RATE_OVER_S
    recent = [step for step in steps if step.ended > since]
    parts = (min(1.0, 1000 * (step.ended - since) / step.ms) if step.ms > 0 else 1.0 for step in recent)
    return sum(part * tokens(step) * step.repetitions for part, step in zip(parts, recent, strict=True)) / _RATE_OVER_S


def _figures(now: Snapshot) -> Line:
    states = [request.state for request in now.requests]
    running = sum(state in ("prefilling", "decoding") for state in states)
    return line(
        ("running ", "dim"),
        (f"{running:,}", "bold"),
        ("   waiting ", "dim"),
        (f"{states.count('waiting'):,}", "bold"),
        *(_rates(now.steps) if now.steps else ()),
    )


def _rates(now: Steps) -> tuple[tuple[str, str], ...]:
    steps, at = now.data, now.now
    return (
        ("   output ", "dim"),
        (f"{rate(steps, at, lambda step: step.answer_tokens):,.0f}", "bold"),
        (" tokens/s   prompt ", "dim"),
        (f"{rate(steps, at, lambda step: step.prompt_tokens):,.0f}", "bold"),
        (" tokens/s", "dim"),
    )


def _whole(steps: Steps, columns: int) -> list[Line]:
    memory = [_memory(one, columns, len(steps.memory) > 1) for one in steps.memory]
    return [*memory, *_recent(steps.data, columns)]


def _memory(kv: Memory, columns: int, named: bool) -> Line:
    total = max(1, kv.total_blocks)
    told = f"  {kv.used_blocks / total:4.0%} used, {kv.cached_blocks / total:.0%} cached"
    told += f" of {total * kv.block_tokens:,} tokens" + (f", {plain(kv.model)}" if named else "")
    width = max(8, min(60, columns - len(told) - 7))
    used = round(width * kv.used_blocks / total)
    cached = round(width * (kv.used_blocks + kv.cached_blocks) / total) - used
    free = width - used - cached
    return line(("KV     ", "dim"), ("█" * used, "decode"), ("▒" * cached, "cached"), ("░" * free, "dim"), told)


def _recent(steps: Sequence[Step], columns: int) -> list[Line]:
    """Bars as high as the steps were long; those that computed prompts in another colour."""
    shown = steps[-max(8, columns - 8) :]
    if not shown:
        return [line(("steps  none yet", "dim"))]
    longest_ms = max(step.each_ms for step in shown) or 1.0
    bars = [
        (_BARS[max(1, round(step.each_ms / longest_ms * (len(_BARS) - 1)))], "prefill" if step.prompts else "decode")
        for step in shown
    ]
    told = f"       last {duration(shown[-1].each_ms)}, longest {duration(longest_ms)}"
    return [line(("steps  ", "dim"), *bars), line((f"{told}; yellow ones computed prompts", "dim"))]


def _table(requests: Sequence[Request], columns: int, rows: int | None, chosen: str | None) -> list[Line]:
    waited = _WAITED if columns >= 70 + 12 + _WAITED else 0
    names = max(12, min(36, columns - 70 - waited))
    widths = (names, 12, 9, 8, 8, 8, 8, 7, waited)
    lines = [line((_cells(_HEADS, widths), "dim"))]
    for request in _window(requests, rows, chosen):
        state, how = _STATES.get(request.state, (request.finish or request.state, "dim"))
        tenant, times = request.tenant or "-", (request.total_ms, request.queue_ms, request.ttft_ms)
        counts = (f"{request.prompt_tokens:,}", f"{request.output_tokens:,}")
        waits_for = plain(request.waits_for) if (request.queue_ms or request.total_ms) >= _TOLD_MS else ""
        ends = (*map(duration, times), *counts, waits_for)
        cells = (_end(plain(request.id), names), plain(tenant), plain(state), *ends)
        lines.append(line((_cells(cells, widths), "chosen" if request.id == chosen else how)))
    return lines if requests else [*lines, line(("no request yet", "dim"))]


def _window(requests: Sequence[Request], rows: int | None, chosen: str | None) -> Sequence[Request]:
    """As many as there is room for, the chosen one among them."""
    if rows is None:
        return requests
    at = next((at for at, request in enumerate(requests) if request.id == chosen), 0)
    first = max(0, at - rows + 1)
    return requests[first : first + rows]


def _cells(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    words = (0, 1, 2, 8)
    padded = [
        cell[:width].ljust(width) if at in words else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return " ".join(padded)


def _end(text: str, width: int) -> str:
    """What tells ids apart is their end."""
    return text if len(text) <= width else "…" + text[1 - width :]
