"""Where in its thinking a text is, one token after the other. A pure function of the tokens, which both sides of a
service know: the executor to end the thinking when its budget is spent, the gateway to count.

    BEFORE --- opening mark ---> THINKING --- closing mark ---------------------> ANSWER
       '-- anything else ---------------------------------------------------------^
                                    '-- budget spent --> CLOSING -- forced ids ---'
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from headrace.core.types import Thinking


class Part(Enum):
    BEFORE = "before"
    THINKING = "thinking"
    CLOSING = "closing"
    ANSWER = "answer"


class Phase(NamedTuple):
    part: Part
    tokens: int = 0  # of thinking so far, those that close it included
    tail: bytes = b""  # the end of the text, where a mark may have begun
    forced: int = 0  # how many of the closing ids were drawn


def begin(thinking: Thinking | None) -> Phase:
    """Before the first token."""
    if thinking is None:
        return Phase(Part.ANSWER)
    return _think(thinking, 0, b"") if thinking.begun else Phase(Part.BEFORE)


def after(phase: Phase, thinking: Thinking | None, piece: bytes) -> Phase:
    """After one more token, which stands for the bytes `piece`."""
    if thinking is None or phase.part is Part.ANSWER:
        return phase
    if phase.part is Part.CLOSING:
        last = phase.forced + 1 == len(thinking.closing_ids)
        part = Part.ANSWER if last else Part.CLOSING
        return Phase(part, phase.tokens + 1, forced=phase.forced + 1)
    if phase.part is Part.THINKING:
        return _think(thinking, phase.tokens + 1, phase.tail + piece)
    return _open(thinking, (phase.tail + piece).lstrip())


def _open(thinking: Thinking, text: bytes) -> Phase:
    mark = thinking.opening.encode()
    if text.startswith(mark):
        return _think(thinking, 0, text[len(mark) :])
    return Phase(Part.BEFORE if mark.startswith(text) else Part.ANSWER, tail=text)


def _think(thinking: Thinking, tokens: int, text: bytes) -> Phase:
    mark = thinking.closing.encode()
    if mark in text:
        return Phase(Part.ANSWER, tokens)
    spent = thinking.budget_tokens is not None and tokens >= thinking.budget_tokens
    part = Part.CLOSING if spent and thinking.closing_ids else Part.THINKING
    return Phase(part, tokens, text[-(len(mark) - 1) :])
