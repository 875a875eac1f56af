"""Schemas of many kinds, made from a number: nested, recursive, enums, patterns, unions, references, large."""

from __future__ import annotations

import random
from typing import Any

KINDS = ("nested", "recursive", "enum", "pattern", "union", "reference", "large", "numbers", "arrays", "formats")


def schema(number: int) -> dict[str, Any]:
    return _MAKERS[KINDS[number % len(KINDS)]](random.Random(number))


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _scalar(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "integer", "minimum": rng.randint(-99, 0), "maximum": rng.randint(1, 999)},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": rng.randint(1, 9)},
            {"const": rng.choice(["x", 7, None, True])},
            {"type": ["string", "null"], "maxLength": 4},
        ]
    )


def _nested(rng: random.Random, depth: int = 4) -> dict[str, Any]:
    names = rng.sample(["alpha", "beta", "gamma", "čvor", 'a "quoted" one'], rng.randint(1, 3))
    return _object({name: _nested(rng, depth - 1) if depth and rng.random() < 0.6 else _scalar(rng) for name in names})


def _recursive(rng: random.Random) -> dict[str, Any]:
    tree = _object({"value": _scalar(rng), "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}})
    return {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}


def _enum(rng: random.Random) -> dict[str, Any]:
    return _object({"pick": {"enum": [f"value {rng.randint(0, 10**6)}" for _ in range(rng.choice([1, 10, 400]))]}})


def _pattern(rng: random.Random) -> dict[str, Any]:
    patterns = ["^[A-Z]{2}[0-9]{3}$", "^(ab|cd){1,3}$", "^[0-9]{4}-[0-9]{2}$", '^[^\\s"]{1,5}$', "^(a+)+b$"]
    return _object({"code": {"type": "string", "pattern": rng.choice(patterns)}})


def _union(rng: random.Random) -> dict[str, Any]:
    kinds = [_object({"kind": {"const": f"k{at}"}, "with": _scalar(rng)}) for at in range(rng.randint(2, 5))]
    return _object({"one": {"anyOf": kinds}})


def _reference(rng: random.Random) -> dict[str, Any]:
    return {"$defs": {"part": _nested(rng, 1)}, **_object({name: {"$ref": "#/$defs/part"} for name in "ab"})}


def _large(rng: random.Random) -> dict[str, Any]:
    fields = {f"field_{at}": _scalar(rng) for at in range(rng.choice([50, 200]))}
    return {**_object(fields), "required": list(fields)[:2]}


def _numbers(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return _object(
        {
            "n": {"type": "number", "minimum": low, "maximum": low + 1},
            "i": {"type": "integer", "minimum": 5, "maximum": 6},
        }
    )


def _arrays(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(0, 2)
    items = {"type": "array", "items": _scalar(rng), "minItems": least, "maxItems": least + rng.randint(1, 2)}
    return _object(
        {
            "list": items,
            "pair": {
                "type": "array",
                "prefixItems": [{"type": "boolean"}, _scalar(rng)],
                "items": False,
                "minItems": 2,
            },
        }
    )


def _formats(rng: random.Random) -> dict[str, Any]:
    return _object({"when": {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4", "date-time"])}})


_MAKERS = {
    "nested": _nested,
    "recursive": _recursive,
    "enum": _enum,
    "pattern": _pattern,
    "union": _union,
    "reference": _reference,
    "large": _large,
    "numbers": _numbers,
    "arrays": _arrays,
    "formats": _formats,
}
