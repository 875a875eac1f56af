"""What dialects share: replies that have one event, the check of a model's name, a `Sampling` from what was given."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from headrace.core.types import Grammar, Sampling
from headrace.gateway import bounds
from headrace.gateway.errors import Refused

E = TypeVar("E")
json = msgspec.json.Encoder().encode
ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


class One(Generic[E]):
    """The one event of a call as a body."""

    stream = False

    def __init__(self, shape: Callable[[E], Any]) -> None:
        self._shape = shape
        self._body = b""

    def feed(self, event: E) -> bytes:
        self._body = json(self._shape(event))
        return b""

    def body(self) -> bytes:
        return self._body

    def end(self) -> bytes:
        return b""

    def failed(self, error: Refused) -> bytes:
        return b""


def check_model(asked: str | None, *served: str | None) -> None:
    """Raises Refused for a name that nothing here answers to. No name means the only model there is."""
    if asked is not None and asked not in served:
        names = " and ".join(repr(name) for name in served if name)
        message = f"The model {asked!r} does not exist; this server has {names}."
        raise Refused(404, message, code="model_not_found", param="model")


def sampling(seed: int | None = None, **given: Any) -> Sampling:
    """Fields of `Sampling` that are not None; without a seed, a seed of its own."""
    known = {name: value for name, value in given.items() if value is not None}
    return Sampling(seed=secrets.randbits(63) if seed is None else seed % (1 << 63), **known)


def schema_grammar(schema: Any, param: str) -> Grammar:
    """Answers that satisfy a JSON schema. Raises Refused for one that is too large; what is wrong in it, its compiler
    says."""
    bounds.check_free(schema, param)
    return Grammar("json_schema", json(schema).decode())
