"""A client's JSON schema made ready to hold an answer to it, so that whatever follows the result follows the schema.

What nobody checks is dropped, what would take too long to compile is refused, and objects are closed: a small model
that may always add another property never ends.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from headrace.gateway.errors import bad

MAX_WORK = 4_000_000  # compiling an object takes the square of its properties: 2000 of them half a second
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_ONES = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "unevaluatedProperties")
_INTERSECTING = ("allOf", "$ref", "anyOf", "oneOf", "if", "not", "patternProperties", "unevaluatedProperties")
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def prepared(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """Raises Refused."""
    schema = copy.deepcopy(schema)
    parts = list(_walk(schema))
    if sum(len(_names(part)) ** 2 for part in parts) > MAX_WORK:
        raise bad(f"{param}: the schema's objects have too many properties.", param, "invalid_grammar")
    meets = any("allOf" in part or ("$ref" in part and "properties" in part) for part in parts)
    for part in parts:
        part.pop("x-guidance", None)  # options of the compiler are not the client's
        if part.get("format") not in _FORMATS:
            part.pop("format", None)  # an annotation, as the standard says of formats that are not known
        if not meets and _can_close(part):
            part["additionalProperties"] = False
    return {**schema, "x-guidance": _COMPACT}


def text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False)


def _walk(schema: Any) -> Iterator[dict[str, Any]]:
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            left += _children(one)


def _children(schema: dict[str, Any]) -> Iterator[Any]:
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, dict):
            yield from value.values()
        elif name in _LISTS and isinstance(value, list):
            yield from value
        elif name in _ONES:
            yield from value if isinstance(value, list) else (value,)


def _names(schema: dict[str, Any]) -> dict[str, Any]:
    names = schema.get("properties")
    return names if isinstance(names, dict) else {}


def _can_close(schema: dict[str, Any]) -> bool:
    """Whether an object without further properties still can be."""
    names, required = _names(schema), schema.get("required", [])
    if not names or "additionalProperties" in schema or any(name in schema for name in _INTERSECTING):
        return False
    enough = len(names) >= _number(schema.get("minProperties"))
    return enough and isinstance(required, list) and all(isinstance(name, str) and name in names for name in required)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0
