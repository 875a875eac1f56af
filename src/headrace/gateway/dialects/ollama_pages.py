"""What Ollama's clients ask about models: /api/tags, /api/ps, /api/show, /api/version. Everything is from cards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from msgspec import Struct

from headrace.core import clock
from headrace.core.ports import Residency
from headrace.gateway import bounds
from headrace.gateway.bounds import Body
from headrace.gateway.card import Card
from headrace.gateway.dialects.ollama import IGNORED, named
from headrace.gateway.dialects.ollama_reply import Error, error_body, rfc3339
from headrace.gateway.dialects.shared import One
from headrace.gateway.edge import Context, Dialect
from headrace.gateway.errors import Refused, bad
from headrace.gateway.openapi import Answer, Operation

_FOREVER_S = 365 * 86_400.0  # of a model that stays; a client wants a date


class Details(Struct):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(Struct, kw_only=True):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(Struct):
    models: list[Tag]


class Loaded(Struct, kw_only=True):
    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class Running(Struct):
    models: list[Loaded]


class Version(Struct):
    version: str


class ShowRequest(Struct, kw_only=True):
    model: bounds.Name | None = None
    name: bounds.Name | None = None
    verbose: bool | None = None


class Show(Struct, kw_only=True):
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


SHOW = Body(ShowRequest, IGNORED, {"system": ("",), "template": ("",), "options": ({},)})


def tags(cards: Sequence[Card]) -> Tags:
    return Tags([Tag(modified_at=rfc3339(card.loaded_s), **_common(card)) for card in cards])


def running(in_memory: Sequence[tuple[Card, Residency]]) -> Running:
    return Running([_loaded(card, residency) for card, residency in in_memory])


def _loaded(card: Card, residency: Residency) -> Loaded:
    left_s = min(_FOREVER_S, max(0.0, residency.leaves_s - clock.now()))
    shown = _common(card) | ({"size": residency.memory_bytes} if residency.memory_bytes else {})
    expires = rfc3339(clock.wall() + left_s)
    return Loaded(expires_at=expires, size_vram=0, context_length=card.context_tokens, **shown)


def show(
    cards: Callable[[], Sequence[Card]], capabilities: Callable[[Card], Sequence[str]]
) -> Callable[[str], AsyncIterator[Show]]:
    """A handler: what is known of one model."""

    async def shown(name: str) -> AsyncIterator[Show]:
        found = [card for card in cards() if name in (card.name, named(card.name))]
        if not found:
            raise Refused(404, f"model '{name}' not found")
        yield _show(found[0], capabilities(found[0]))

    return shown


def parse_show(body: bytes, context: Context) -> tuple[str, One[Show]]:
    """Raises Refused."""
    asked = SHOW.decode(body)
    name = asked.model or asked.name
    if name is None:
        raise bad("model is required.", "model")
    context.caller.check_model(name.removesuffix(":latest"))
    return name, One(lambda event: event)


def _common(card: Card) -> dict[str, Any]:
    name = named(card.name)
    return {
        "name": name,
        "model": name,
        "size": card.weights_bytes,
        "digest": card.digest,
        "details": _details(card),
    }


def _details(card: Card) -> Details:
    return Details("", card.format, card.family, [card.family], card.size, card.quantization)


def _show(card: Card, capabilities: Sequence[str]) -> Show:
    info = {
        "general.architecture": card.family,
        "general.parameter_count": card.parameters,
        f"{card.family}.context_length": card.context_tokens,
    }
    if card.embedding_dimensions:
        info[f"{card.family}.embedding_length"] = card.embedding_dimensions
    return Show(
        modelfile=f"FROM {named(card.name)}\n",
        parameters="",
        template=card.template,
        details=_details(card),
        model_info=info,
        capabilities=list(capabilities),
        modified_at=rfc3339(card.loaded_s),
    )


DIALECT = Dialect(
    Operation("/api/show", "POST", "What is known of a model (Ollama's shape)", {200: Answer(Show)}, Error, SHOW),
    parse_show,
    error_body,
    any_type=True,
)
