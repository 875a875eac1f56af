"""The terminal of `headrace top`: raw keys in, frames out, once a second. Leaves the terminal as it found it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import termios
import tty
from collections.abc import Iterator
from dataclasses import dataclass, field

from headrace.cli.top import frame
from headrace.cli.top.frame import Line, Size, line
from headrace.cli.top.source import Away, Snapshot, Source

_EVERY_S = 1.0
_OTHER_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_KEYS = {"\x1b[A": "up", "\x1bOA": "up", "k": "up", "\x1b[B": "down", "\x1bOB": "down", "j": "down"}
_KEYS |= {"\r": "enter", "\n": "enter", "\x1b": "back", "q": "quit", "\x03": "quit"}
_HELP = " up/down choose   enter explain   esc back   q quit"


def columns() -> int:
    return shutil.get_terminal_size(fallback=(120, 24)).columns  # where there is no terminal, room for whole ids


@dataclass(slots=True)
class View:
    """What is shown: all requests, or the explanation of one. A server that is away for a moment keeps its last frame,
    with a line that says so."""

    source: Source
    now: Snapshot | None = None
    away: str | None = None
    chosen: str | None = None
    explained: bool = False
    words: list[str] = field(default_factory=list)

    def refresh(self) -> None:
        try:
            self.now = self.source.now()
            if self.explained and self.chosen is not None:
                self.words = self.source.explain(self.chosen)
            self.away = None
        except Away as error:
            self.away = str(error)

    def press(self, key: str) -> bool:
        """False: that is the end."""
        match key:
            case "up":
                self._move(-1)
            case "down":
                self._move(1)
            case "enter" if self.chosen is not None:
                self.explained, self.words = True, []
                self.refresh()
            case "back":
                self.explained = False
        return key != "quit"

    def lines(self, size: Size) -> list[Line]:
        below = line((frame.plain(self.away), "bad")) if self.away else line((_HELP, "dim"))
        if self.now is None:
            return [below]
        rows = None if size.rows is None else size.rows - 1
        inner = Size(size.columns, rows)
        if self.explained and self.chosen is not None:
            return [*frame.explanation(self.chosen, self.words, inner), below]
        return [*frame.overview(self.now, inner, self.chosen), below]

    def _move(self, by: int) -> None:
        ids = [request.id for request in self.now.requests] if self.now else []
        if not ids or self.explained:
            return
        at = ids.index(self.chosen) + by if self.chosen in ids else 0
        self.chosen = ids[max(0, min(at, len(ids) - 1))]


def watch(source: Source) -> None:
    """Until q. Raises Away if the server does not answer at all."""
    view = View(source, source.now())
    with _raw():
        going = True
        while going:
            size = shutil.get_terminal_size()
            _show(view.lines(Size(size.columns, size.lines)))
            pressed = _pressed()
            if not pressed:
                view.refresh()
            going = all([view.press(_KEYS.get(pressed, ""))] if pressed else [])


def _show(lines: list[Line]) -> None:
    text = "\x1b[K\r\n".join(one.text(True) for one in lines)
    sys.stdout.write(f"\x1b[H\x1b[?7l{text}\x1b[K\x1b[J\x1b[?7h")  # without wrapping: a narrow terminal cuts
    sys.stdout.flush()


def _pressed() -> str:
    """What was typed within a second, or nothing."""
    ready, _, _ = select.select([sys.stdin], [], [], _EVERY_S)
    return os.read(sys.stdin.fileno(), 16).decode(errors="replace") if ready else ""


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        sys.stdout.write(_OTHER_SCREEN)
        yield
    finally:
        sys.stdout.write(_BACK)
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
