"""What an answer is held to, as one grammar: a response format, tool calls that must be made, or strict tools.

Tool calls are written as the model's own template writes them (see `style`), so what is forced is what the model knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.core.types import Grammar
from headrace.gateway.bounds import check_free
from headrace.gateway.chain import Tool, Tools
from headrace.gateway.errors import bad
from headrace.gateway.speech import schema
from headrace.gateway.speech.style import CallStyle

MOST_CALLS = 8  # of one answer that must be calls
Token = Callable[[str], int | None]  # the id of a special token


def json_schema(given: dict[str, Any], param: str) -> Grammar:
    """Raises Refused."""
    check_free(given, param)
    return Grammar("json_schema", schema.text(schema.prepared(given, param)))


def choice(texts: Sequence[str]) -> Grammar:
    return Grammar("lark", "start: " + " | ".join(map(_text, texts)))


def held_to(grammar: Grammar | None, tools: Tools, style: CallStyle, token: Token) -> Grammar | None:
    """The grammar of a whole answer, or None if it is free. Raises Refused for what cannot be combined."""
    if not tools.offered:
        return grammar
    if tools.must:
        return Grammar("lark", _only_calls(tools, style, token))
    if grammar is not None:
        if grammar.kind != "json_schema":
            raise bad("A grammar, a regex or a choice cannot be combined with tools; use json_schema.", "tools")
        rest = _only_calls(tools, style, token).replace("start:", "calls:", 1)
        return Grammar("lark", f"start: said | calls\nsaid: %json {grammar.text}\n{rest}")
    if any(tool.strict for tool in tools.offered):
        return Grammar("lark", _text_or_calls(tools, style, token))
    return None


def _only_calls(tools: Tools, style: CallStyle, token: Token) -> str:
    """One call, or up to MOST_CALLS where they may be parallel and none is named."""
    offered = [tool for tool in tools.offered if tools.named in (None, tool.name)]
    more = MOST_CALLS - 1 if tools.parallel and tools.named is None else 0
    opening, closing = _mark(style.opening, token), _mark(style.closing, token)
    body, rules = _bodies(offered, style)
    if style.separator is None:
        one = " ".join(part for part in (opening, _text(style.begin), "body", _text(style.end), closing) if part)
        start = "start: one" + (f' ("\\n" one){{0,{more}}}' if more else "")
        return f"{start}\none: {one}\n{body}\n{rules}"
    many = "body" + (f" ({_text(style.separator)} body){{0,{more}}}" if more else "")
    parts = (opening, _text(style.begin), many, _text(style.end), closing)
    return f"start: {' '.join(part for part in parts if part)}\n{body}\n{rules}"


def _text_or_calls(tools: Tools, style: CallStyle, token: Token) -> str:
    """Any text, but from an opening mark on, calls."""
    rest = _only_calls(tools, style, token).replace("start:", "calls:", 1)
    if not style.opening:
        return f"start: calls | TEXT\nTEXT: /[^{{](.|\\n)*/\n{rest}"
    special = token(style.opening)
    if special is not None:
        return f"start: TEXT | TEXT calls\nTEXT: /(.|\\n)*/\n{rest}"
    after = rest.replace(_text(style.opening), '""', 1)
    return f"start: TEXT | begin calls\nbegin[lazy]: /(.|\\n)*/ {_text(style.opening)}\nTEXT: /(.|\\n)*/\n{after}"


def _bodies(offered: Sequence[Tool], style: CallStyle) -> tuple[str, str]:
    """A rule for any call, and one for each tool's."""
    rules = []
    for at, tool in enumerate(offered):
        head = f'{{"name": {json.dumps(tool.name)}, "{style.arguments}": '
        rules.append(f"call_{at}: {_text(head)} %json {_arguments(tool.parameters)} {_text('}')}")
    return "body: " + " | ".join(f"call_{at}" for at in range(len(offered))), "\n".join(rules)


def _arguments(parameters: Mapping[str, Any]) -> str:
    return schema.text(schema.prepared({**parameters, "type": "object"}, "tools"))


def _mark(mark: str, token: Token) -> str:
    special = token(mark) if mark else None
    return f"<[{special}]>" if special is not None else _text(mark)


def _text(text: str) -> str:
    """A literal of the grammar."""
    return json.dumps(text) if text else ""
