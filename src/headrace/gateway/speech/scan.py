"""Reads one tool call as it is written, a JSON object or Qwen's tags, in pieces of any length and in linear time.

A scanner takes text and gives pieces of the call: its name once, then its arguments as JSON text. It never looks back.
What is no call raises `NoCall`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

_SPACE = re.compile(r"[ \t\r\n]*")
_IN_STRING = re.compile(r'[^"\\]*')
_IN_VALUE = re.compile(r'[^"{}\[\]]*')
_PLAIN = re.compile(r"[^,}\s]*")
_ARGUMENTS = ("arguments", "parameters")


class NoCall(Exception):
    """The text is not a call, as its character at `at` tells."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at


class Scanner(Protocol):
    @property
    def name(self) -> str | None:
        """Of the tool, once it is known."""
        ...

    @property
    def done(self) -> bool: ...

    def push(self, text: str, at: int) -> tuple[int, str]:
        """Read `text` from `at` on, to its end, or to where the name is known, or the call done. Returns where it
        stopped and a piece of the arguments. Raises NoCall if the name is not known yet; a call that breaks later is
        done there."""
        ...


Step = Callable[[str, int], int]  # reads text from a place on, and returns where it stopped


class ObjectScanner:
    """{"name": "f", "arguments": {...}}, or "parameters", in any order and among other keys. The arguments may be a
    string that holds the JSON. They go out as they were written, once the name is known."""

    def __init__(self, known: Callable[[str], bool]) -> None:
        """`known` says whether a name may be called."""
        self.name: str | None = None
        self.done = False
        self._known = known
        self._next: Step = self._begin
        self._key = ""
        self._word: list[str] = []  # pieces of a string or of a plain value
        self._depth = 0
        self._quoted = self._escaped = False
        self._out: list[str] = []
        self._has_arguments = False
        self._bare = False  # the arguments stand alone, without the object around them

    def push(self, text: str, at: int) -> tuple[int, str]:
        named = self.name is not None
        try:
            while at < len(text) and not self.done and (self.name is not None) == named:
                at = self._next(text, at)
        except NoCall as no:
            if not named:
                raise
            self.done, at = True, no.at
        else:
            self._complete(at)
        out, self._out = ("".join(self._out), []) if self.name is not None else ("", self._out)
        return at, out

    def _complete(self, at: int) -> None:
        if self.done and self.name is None:
            raise NoCall(at)
        if self.done and not self._has_arguments:
            self._give("{}")

    def only_arguments(self, name: str) -> None:
        """The name is known already; what comes is the arguments and nothing else."""
        self.name, self._key, self._next = name, "arguments", self._value
        self._bare = True

    def _expect(self, text: str, at: int, then: Mapping[str, Step | None]) -> int:
        """Past white space and one of some characters; None ends the object."""
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return at
        if text[at] not in then:
            raise NoCall(at)
        following = then[text[at]]
        if following is None:
            self.done = True
        else:
            self._next = following
        return at + 1

    def _begin(self, text: str, at: int) -> int:
        return self._expect(text, at, {"{": self._first_key})

    def _first_key(self, text: str, at: int) -> int:
        return self._expect(text, at, {'"': self._in_key, "}": None})

    def _other_key(self, text: str, at: int) -> int:
        return self._expect(text, at, {'"': self._in_key})

    def _in_key(self, text: str, at: int) -> int:
        at, word = self._string(text, at)
        if word is not None:
            self._key, self._next = word, self._colon
        return at

    def _colon(self, text: str, at: int) -> int:
        return self._expect(text, at, {":": self._value})

    def _comma(self, text: str, at: int) -> int:
        return self._expect(text, at, {",": self._other_key, "}": None})

    def _value(self, text: str, at: int) -> int:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return at
        match text[at]:
            case '"' if not self._bare:
                self._next = self._in_text
                return at + 1
            case "{" | "[":
                if self._key == "name" or (self._key in _ARGUMENTS and (text[at] == "[" or self._has_arguments)):
                    raise NoCall(at)
                self._next = self._nested
            case _:
                self._next = self._plain
        return at

    def _in_text(self, text: str, at: int) -> int:
        at, word = self._string(text, at)
        if word is None:
            return at
        if self._key == "name":
            if self.name is not None or not self._known(word):
                raise NoCall(at)
            self.name = word
        elif self._key in _ARGUMENTS:
            if self._has_arguments:
                raise NoCall(at)
            self._give(word)
        self._next = self._comma
        return at

    def _plain(self, text: str, at: int) -> int:
        end = _PLAIN.match(text, at).end()  # type: ignore[union-attr]
        self._word.append(text[at:end])
        if end < len(text):
            word, self._word = "".join(self._word), []
            if not word or self._key == "name" or (self._key in _ARGUMENTS and word != "null"):
                raise NoCall(end)
            self._next = self._comma
        return end

    def _nested(self, text: str, at: int) -> int:
        """An object or a list."""
        start = at
        while at < len(text):
            at = self._inside(text, at)
            if not self._depth:
                self._next, self.done = self._comma, self._bare
                break
        if self._key in _ARGUMENTS:
            self._give(text[start:at])
        return at

    def _inside(self, text: str, at: int) -> int:
        """Past the next character that matters."""
        if self._escaped:
            self._escaped = False
            return at + 1
        at = (_IN_STRING if self._quoted else _IN_VALUE).match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return at
        match text[at]:
            case '"':
                self._quoted = not self._quoted
            case "\\":
                self._escaped = True
            case "{" | "[":
                self._depth += 1
            case _:
                self._depth -= 1
        if self._depth > 16 and self.name is None:
            raise NoCall(at)
        return at + 1

    def _string(self, text: str, at: int) -> tuple[int, str | None]:
        """The rest of a string: where it ends, and the whole of it, decoded, if it does."""
        start = at
        while at < len(text):
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            at = _IN_STRING.match(text, at).end()  # type: ignore[union-attr]
            if at == len(text):
                break
            at += 1
            if text[at - 1] == '"':
                self._word.append(text[start : at - 1])
                word, self._word = "".join(self._word), []
                return at, _decoded(word, at)
            self._escaped = True
        self._word.append(text[start:at])
        return at, None

    def _give(self, arguments: str) -> None:
        self._has_arguments = True
        self._out.append(arguments)


def _decoded(word: str, at: int) -> str:
    try:
        return str(json.loads(f'"{word}"', strict=False))
    except ValueError:
        raise NoCall(at) from None


class TagScanner:
    """<function=f><parameter=p>value</parameter></function>, as Qwen3-Coder calls. Values are text, and become JSON
    by what the tool's schema says of them."""

    def __init__(self, known: Callable[[str], bool], kinds: Callable[[str], Mapping[str, Any]]) -> None:
        """`kinds` gives a tool's parameters by name, each a JSON schema."""
        self.name: str | None = None
        self.done = False
        self._known = known
        self._kinds = kinds
        self._held = ""
        self._sought = 0  # where in what is held the end of a parameter may be
        self._given = 0  # parameters so far

    def push(self, text: str, at: int) -> tuple[int, str]:
        shift = at - len(self._held)  # from places in what is held to places in `text`
        self._held += text[at:]
        named, taken, out = self.name is not None, 0, ""
        try:
            while not self.done and (self.name is not None) == named and (found := self._tag(taken)):
                taken, piece = found
                out += piece
        except NoCall as no:
            if not named:
                raise
            self.done, taken = True, no.at
        stopped = self.done or (self.name is not None) != named
        end = shift + taken if stopped else len(text)
        self._held = "" if stopped else self._held[taken:]
        self._sought = max(0, self._sought - taken)
        return end, out

    def _tag(self, at: int) -> tuple[int, str] | None:
        """What follows at this place, if all of it is there: where it ends, and what it adds to the arguments."""
        at = _SPACE.match(self._held, at).end()  # type: ignore[union-attr]
        rest = self._held[at : at + 16]
        if self.name is None:
            return self._function(at, rest)
        tag = next(
            (tag for tag in ("</function>", "<parameter=") if rest.startswith(tag) or tag.startswith(rest)), None
        )
        if tag is None:
            raise NoCall(at + max(_common(rest, "</function>"), _common(rest, "<parameter=")))
        if len(rest) < len(tag):
            return None
        if tag == "<parameter=":
            return self._parameter(at)
        self.done = True
        return at + len(tag), "}" if self._given else "{}"

    def _function(self, at: int, rest: str) -> tuple[int, str] | None:
        opening = "<function="
        if not (opening.startswith(rest) or rest.startswith(opening)):
            raise NoCall(at)
        close = self._held.find(">", at)
        if close < 0:
            return None
        name = self._held[at + len(opening) : close].strip()
        if not self._known(name):
            raise NoCall(close)
        self.name = name
        return close + 1, ""

    def _parameter(self, at: int) -> tuple[int, str] | None:
        ending = "</parameter>"
        end = self._held.find(ending, max(at, self._sought))
        if end < 0:
            self._sought = max(at, len(self._held) - len(ending))
            return None
        key, closed, value = self._held[at + len("<parameter=") : end].partition(">")
        if not closed:
            raise NoCall(end + len(ending))
        piece = ("{" if not self._given else ", ") + json.dumps(key.strip()) + ": "
        self._given += 1
        return end + len(ending), piece + self._json(key.strip(), value)

    def _json(self, key: str, value: str) -> str:
        value = value.removeprefix("\n").removesuffix("\n")
        kind = self._kinds(self.name or "").get(key)
        if not isinstance(kind, dict) or kind.get("type") != "string":
            try:
                return json.dumps(json.loads(value), ensure_ascii=False)
            except (ValueError, RecursionError):
                pass
        return json.dumps(value, ensure_ascii=False)


def _common(left: str, right: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
