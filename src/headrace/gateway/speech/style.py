"""The ways in which families of models reason and call tools, and which of them a chat template means.

A style is a value: marks, and how calls are written between them. Nothing here reads an answer (see `answer`) or holds
one to a grammar (see `demand`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.core.types import HeadraceError


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How calls are written: opening, calls with `between` in between them, closing; perhaps several times."""

    opening: str  # a mark; empty: an answer that begins with a brace is calls
    closing: str
    between: str  # characters that may stand around a call
    begin: str = ""  # what to write after the opening mark, before the first call, when there is a choice
    separator: str | None = None  # between calls; None: each has marks of its own
    end: str = ""  # after the last call, before the closing mark
    arguments: str = "arguments"  # the key of the arguments
    named: bool = False  # a call may also be written name{...} or name[ARGS]{...}
    id_chars: int = 24


@dataclass(frozen=True, slots=True)
class ThinkStyle:
    opening: str
    closing: str


HERMES = CallStyle("<tool_call>", "</tool_call>", " \t\r\n", begin="\n", end="\n")
CALLS: Mapping[str, CallStyle] = {
    "hermes": HERMES,  # Hermes, Qwen 2.5 and 3; Qwen3-Coder's tags are understood as well
    "mistral": CallStyle("[TOOL_CALLS]", "", " \t\r\n[],", begin="[", separator=", ", end="]", named=True, id_chars=9),
    "llama3": CallStyle("", "", " \t\r\n;", separator="; ", arguments="parameters"),
}
THINKS: Mapping[str, ThinkStyle] = {
    "think": ThinkStyle("<think>", "</think>"),
    "mistral": ThinkStyle("[THINK]", "[/THINK]"),
}
PYTHON_TAG = "<|python_tag|>"  # Llama writes it before some calls


class UnknownStyle(HeadraceError):
    """A style that the settings name and that does not exist."""


@dataclass(frozen=True, slots=True)
class Style:
    calls: CallStyle
    knows_tools: bool  # the template shows tools, calls and results itself
    think: ThinkStyle | None

    @property
    def marks(self) -> tuple[str, ...]:
        """Where these are special tokens, they are still part of the text."""
        think = (self.think.opening, self.think.closing) if self.think else ()
        return tuple(mark for mark in (self.calls.opening, self.calls.closing, PYTHON_TAG, "[ARGS]", *think) if mark)


def style_of(template: str | None, knows_tools: bool, tool_parser: str = "auto", reasoning: str = "auto") -> Style:
    """By what the template contains, unless the settings say otherwise. Raises UnknownStyle."""
    template = template or ""
    if tool_parser == "auto":
        tool_parser = _calls_in(template) if knows_tools else "hermes"
    if tool_parser not in CALLS:
        raise UnknownStyle(f"there is no tool parser {tool_parser!r}; choose auto, {', '.join(CALLS)}")
    if reasoning == "auto":
        reasoning = next((name for name, think in THINKS.items() if think.closing in template), "none")
    if reasoning not in (*THINKS, "none"):
        raise UnknownStyle(f"there is no reasoning style {reasoning!r}; choose auto, none, {', '.join(THINKS)}")
    return Style(CALLS[tool_parser], knows_tools, THINKS.get(reasoning))


def _calls_in(template: str) -> str:
    if CALLS["mistral"].opening in template:
        return "mistral"
    if HERMES.opening in template:
        return "hermes"
    return "llama3" if '"parameters"' in template or PYTHON_TAG in template else "hermes"
