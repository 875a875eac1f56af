"""For models whose chat template does not know of tools: a system message tells them, calls and results become text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.gateway.chain import Tool, Tools
from headrace.gateway.speech.style import HERMES

_HOW = """You may call functions to answer the user. These are their signatures, one JSON object a line:
{tools}
To call a function, write its name and its arguments as JSON between tags, and nothing else:
{opening}
{{"name": <function-name>, "arguments": <arguments-object>}}
{closing}"""


def described(tool: Tool) -> dict[str, Any]:
    """A tool as templates expect it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def told(messages: Sequence[Mapping[str, Any]], tools: Tools) -> tuple[Mapping[str, Any], ...]:
    """Messages of plain text that say the same."""
    plain = [_plain(message) for message in messages]
    if not tools.offered:
        return tuple(plain)
    lines = "\n".join(json.dumps(described(tool), ensure_ascii=False) for tool in tools.offered)
    how = _HOW.format(tools=lines, opening=HERMES.opening, closing=HERMES.closing)
    if plain and plain[0]["role"] == "system":
        return ({**plain[0], "content": f"{plain[0]['content']}\n\n{how}"}, *plain[1:])
    return ({"role": "system", "content": how}, *plain)


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    text = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    return {"role": message["role"], "content": "\n".join([text, *calls] if text else calls)}


def _call(function: Mapping[str, Any]) -> str:
    called = {"name": function["name"], "arguments": function["arguments"]}
    return f"{HERMES.opening}\n{json.dumps(called, ensure_ascii=False)}\n{HERMES.closing}"
