"""Takes the text of one answer apart as it comes: reasoning, text to show, and tool calls.

Whatever the pieces in which the text arrives, what comes out is the same when put together again. Work per character
is constant. Owns the state of one answer.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.gateway.chain import ToolPiece, Tools
from headrace.gateway.speech.scan import NoCall, ObjectScanner, Scanner, TagScanner
from headrace.gateway.speech.style import PYTHON_TAG, CallStyle, Style, ThinkStyle

_SPACE = " \t\r\n"
MOST_HELD_CHARS = 1024  # of what may be a call; by then it has said its name
MOST_GLUE_CHARS = 256  # around calls
_ID_CHARS = string.ascii_letters + string.digits


@dataclass(slots=True)
class Parts:
    """What one push yields, in the order: reasoning, text, calls."""

    reasoning: str = ""
    text: str = ""
    calls: list[ToolPiece] = field(default_factory=list)


class Reasoning:
    """Splits text at the marks. White space around the marks belongs to neither side."""

    def __init__(self, style: ThinkStyle | None, begun: bool) -> None:
        self._style = style
        self.thinking = begun and style is not None
        self._looking = style is not None and not begun  # the opening mark may come first, and nowhere else
        self._held = ""
        self._fresh = True  # nothing but white space since the last mark

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, the rest)."""
        if self._style is None:
            return "", text
        if self._looking:
            text = self._look(self._held + text, self._style.opening)
        if not self.thinking:
            return "", self._plain(text)
        known = self._held + text
        before, mark, after = known.partition(self._style.closing)
        if mark:
            self.thinking, self._held = False, ""
            reasoning, self._fresh = self._without_lead(before.rstrip(_SPACE)), True
            return reasoning, self._plain(after)
        kept = _beginning_of(self._style.closing, known)
        shown = known[: len(known) - kept].rstrip(_SPACE)
        self._held = known[len(shown) :]
        return self._without_lead(shown), ""

    def end(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held.rstrip(_SPACE), "") if self.thinking else ("", held)

    def _look(self, text: str, mark: str) -> str:
        """What follows the opening mark, if it is there; nothing as long as it may come."""
        begun = text.lstrip(_SPACE)
        if begun.startswith(mark):
            self.thinking, self._looking, self._held = True, False, ""
            return begun[len(mark) :]
        if mark.startswith(begun):
            self._held = text
            return ""
        self._looking, self._fresh, self._held = False, False, ""
        return text

    def _plain(self, text: str) -> str:
        return self._without_lead(text)

    def _without_lead(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip(_SPACE)
            self._fresh = not text
        return text


class Calls:
    """Finds tool calls. White space beside calls is dropped, and what looked like a call and is none is text."""

    def __init__(self, style: CallStyle, tools: Tools) -> None:
        self._style = style
        self._tools = {tool.name: tool for tool in tools.offered}
        self._most = None if tools.parallel else 1
        self._held = ""  # text that may become a mark, or a call that is not certain yet
        self._at = 0  # of it, what the scanner has read
        self._scanner: Scanner | None = None
        self._inside = False  # after an opening mark
        self._space = ""  # white space that is shown only if text follows
        self._spoke = False  # something but white space was shown
        self.count = 0

    @property
    def full(self) -> bool:
        """No further call is wanted."""
        return self._most is not None and self.count >= self._most and self._scanner is None

    def push(self, text: str) -> Parts:
        parts = Parts()
        self._held += text
        while self._held and self._advance(parts):
            pass
        return parts

    def end(self) -> Parts:
        """No more text comes: a call that was cut stays cut."""
        parts = Parts()
        if self._scanner is None or self._scanner.name is None:
            self._scanner = None
            held, self._held = self._held, ""
            if not (self._inside and self.count) or held.strip(self._style.between):
                self._show(held, parts)
        if not self.count:
            parts.text, self._space = parts.text + self._space, ""
        return parts

    def _advance(self, parts: Parts) -> bool:
        """Take something from what is held; False if more text is needed."""
        if self._scanner is not None:
            return self._scan(self._scanner, parts)
        return self._between(parts) if self._inside else self._outside(parts)

    def _outside(self, parts: Parts) -> bool:
        opening = self._style.opening or PYTHON_TAG
        if not self._style.opening and not self._spoke:
            begun = self._held.lstrip(_SPACE)
            if begun.startswith("{"):
                self._inside, self._at = True, 0
                return True
            if not begun:
                return False
        at = self._held.find(opening)
        if at >= 0:
            self._show(self._held[:at], parts)
            self._held, self._inside, self._at = self._held[at:], True, len(opening)
            return True
        shown = len(self._held) - _beginning_of(opening, self._held)
        self._show(self._held[:shown], parts)
        self._held = self._held[shown:]
        return False

    def _between(self, parts: Parts) -> bool:
        """Inside the marks and outside a call. `_held` begins with the last mark or call that was not shown."""
        style, held = self._style, self._held
        at = self._at
        while at < len(held):
            self._at = at
            if at > MOST_GLUE_CHARS:
                self._give_up(parts)
                return True
            if style.opening and held.startswith(style.opening, at):
                at += len(style.opening)
            elif style.opening and style.opening.startswith(held[at : at + len(style.opening)]):
                return False
            elif held[at] not in style.between:
                break
            else:
                at += 1
        rest = held[at : at + 16]
        if not rest or (style.closing and style.closing.startswith(rest) and rest != style.closing):
            return False
        if style.closing and rest.startswith(style.closing):
            self._held, self._inside = held[at + len(style.closing) :], False
            return True
        scanner = self._scanner_for(rest)
        if scanner is None:
            return False
        self._scanner, self._at = scanner, at
        return True

    def _scanner_for(self, rest: str) -> Scanner | None:
        if rest.startswith("{"):
            return ObjectScanner(self._tools.__contains__)
        if self._style.named and (rest[0].isalnum() or rest[0] in "_-."):
            return _NamedScanner(self._tools.__contains__)
        if rest.startswith("<"):
            return TagScanner(self._tools.__contains__, self._kinds)
        return _NoScanner()

    def _kinds(self, name: str) -> Mapping[str, Any]:
        kinds = self._tools[name].parameters.get("properties")
        return kinds if isinstance(kinds, dict) else {}

    def _scan(self, scanner: Scanner, parts: Parts) -> bool:
        named = scanner.name is not None
        # a call says its name within so many characters: this bounds what is held, and how often it is read again
        reach = self._held if named else self._held[:MOST_HELD_CHARS]
        try:
            at, arguments = scanner.push(reach, self._at)
            if scanner.name is None and at == MOST_HELD_CHARS:
                raise NoCall(at)
        except NoCall:
            self._give_up(parts)
            return True
        if scanner.name is None:
            self._at = at
            return False
        if not named:
            self._space = ""
            parts.calls.append(ToolPiece(self.count, _call_id(self._style.id_chars), scanner.name, arguments))
            self.count += 1
        elif arguments:
            parts.calls.append(ToolPiece(self.count - 1, arguments=arguments))
        self._held, self._at = self._held[at:], 0
        if scanner.done:
            self._scanner = None
        return bool(self._held)

    def _give_up(self, parts: Parts) -> None:
        """It is no call: its first character is text, and what follows is looked at again."""
        self._scanner, self._inside, self._spoke = None, False, True
        self._show(self._held[:1], parts)
        self._held, self._at = self._held[1:], 0

    def _show(self, text: str, parts: Parts) -> None:
        if not text:
            return
        known = self._space + text
        shown = known.rstrip(_SPACE)
        if shown:
            self._spoke = True
        parts.text += shown
        self._space = known[len(shown) :]


class _NoScanner:
    name: str | None = None
    done = False

    def push(self, text: str, at: int) -> tuple[int, str]:
        raise NoCall(at)


class _NamedScanner:
    """name{...} or name[ARGS]{...}, as newer Mistral models call."""

    def __init__(self, known: Callable[[str], bool]) -> None:
        self.name: str | None = None
        self._known = known
        self._word = ""
        self._arguments = ObjectScanner(known)

    @property
    def done(self) -> bool:
        return self._arguments.done

    def push(self, text: str, at: int) -> tuple[int, str]:
        if self.name is not None:
            return self._arguments.push(text, at)
        brace = text.find("{", at)
        self._word += text[at : len(text) if brace < 0 else brace]
        name = self._word.strip().removesuffix("[ARGS]").strip()
        if len(self._word) > 300 or (brace >= 0 and not self._known(name)):
            raise NoCall(at)
        if brace < 0:
            return len(text), ""
        self.name = name
        self._arguments.only_arguments(name)
        return brace, ""


def _beginning_of(mark: str, text: str) -> int:
    """How long the longest end of `text` is that a mark may begin with."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)


def _call_id(chars: int) -> str:
    name = "".join(secrets.choice(_ID_CHARS) for _ in range(chars))
    return name if chars < 24 else f"call_{name}"


class Answer:
    """The text of one choice while it grows. `begun`: it begins inside the reasoning."""

    def __init__(self, style: Style, tools: Tools, begun: bool) -> None:
        self._reasoning = Reasoning(style.think, begun)
        self._calls = Calls(style.calls, tools) if tools.offered else None

    @property
    def called(self) -> bool:
        return self._calls is not None and self._calls.count > 0

    @property
    def full(self) -> bool:
        """All calls that are wanted are there: the answer may end."""
        return self._calls is not None and self._calls.full

    def push(self, text: str) -> Parts:
        return self._parts(*self._reasoning.push(text))

    def end(self) -> Parts:
        parts = self._parts(*self._reasoning.end())
        if self._calls is not None:
            last = self._calls.end()
            parts.text += last.text
        return parts

    def _parts(self, reasoning: str, text: str) -> Parts:
        parts = self._calls.push(text) if self._calls is not None and text else Parts(text=text)
        parts.reasoning = reasoning
        return parts
