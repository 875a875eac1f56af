"""What a server has beside the model that writes: an embedding model, a database for what outlives the process, and
cards that tell of its models."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.cli.assemble import Assembled, Phases, open_embedding
from headrace.core import clock, config
from headrace.core.config import BadSetting, GatewaySettings
from headrace.core.ports import Encoder, Service

if TYPE_CHECKING:
    from headrace.engine.embedding import Batcher
    from headrace.gateway.card import Card
    from headrace.gateway.embedding import Words
    from headrace.gateway.endpoints import Extras
    from headrace.gateway.explaining import Tracing
    from headrace.gateway.keys import Guard
    from headrace.gateway.limits import Store
    from headrace.gateway.models import Model
    from headrace.gateway.state.database import Database

_WAITING_TOKENS = 1_000_000  # to be embedded, beyond which requests are refused with 429


@dataclass(frozen=True, slots=True)
class Beside:
    extras: Extras
    batcher: Batcher | None  # somebody has to run it


def open_beside(assembled: Assembled, settings: GatewaySettings, phase: Phases, guard: Guard, limits: Store) -> Beside:
    """Raises BadState or BadModelFile if what the user named cannot be used; a default that is not here is left out."""
    from headrace.gateway.endpoints import Extras
    from headrace.gateway.explaining import Book

    found = embedding_of(assembled, settings, phase)
    batcher, words, cards = found if found else (None, None, ())
    database = open_database(assembled.name, settings)
    phase.done()
    book = Book(assembled.explanations, settings.explained, tracing_of(settings))
    return Beside(Extras(batcher, words, database, cards, book, guard, limits), batcher)


def tracing_of(settings: GatewaySettings) -> Tracing | None:
    """Raises BadSetting where spans are asked for and the extra is not installed."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from headrace.gateway.traces import Traces
    except ImportError as error:
        raise BadSetting("--otlp-endpoint needs OpenTelemetry: pip install 'headrace[otel]'") from error
    return Traces.to(settings.otlp_endpoint)


def model_of(assembled: Assembled, service: Service, settings: GatewaySettings) -> Model:
    """The model as the gateway knows it."""
    from headrace.gateway.checks import Checks
    from headrace.gateway.models import Model

    checks = Checks(assembled.grammars.check, settings.grammar_timeout_s)
    return Model(assembled.name, service, assembled.text, card_of(assembled), assembled.metrics, checks)


def embedding_of(
    assembled: Assembled, settings: GatewaySettings, phase: Phases
) -> tuple[Batcher, Words, tuple[Card, ...]] | None:
    """The embedding model: where the other computes, so that the two never compute at once."""
    from headrace.engine.embedding import Batcher
    from headrace.gateway.card import Card
    from headrace.gateway.embedding import Words

    found = _encoder(assembled, settings, phase)
    if found is None:
        return None
    encoder, tokenizer_json, nbytes = found
    encoding = encoder.encoding
    card = Card(
        encoding.model,
        family="bert",
        parameters=nbytes // 4,
        weights_bytes=nbytes,
        quantization="F32",
        context_tokens=encoding.max_tokens,
        embedding_dimensions=encoding.dimensions,
        loaded_s=clock.wall(),
    )
    return Batcher(encoder, _WAITING_TOKENS), Words(tokenizer_json), (card,)


def _encoder(assembled: Assembled, settings: GatewaySettings, phase: Phases) -> tuple[Encoder, str, int] | None:
    """(encoder, its tokenizer.json, bytes of weights)."""
    if assembled.apart is not None:
        facts = assembled.loaded.encoder
        return None if facts is None else (assembled.apart, facts.tokenizer_json, facts.nbytes)
    if settings.embedding_model in ("none", ""):
        return None
    opened = open_embedding(settings.embedding_model, assembled.loaded.device, phase)
    if opened is None:
        return None
    encoder, tokenizer_json = opened
    from headrace.device.executor import ModelExecutor

    assert isinstance(assembled.executor, ModelExecutor)
    return encoder.on(assembled.executor.thread), tokenizer_json, encoder.model.nbytes


def open_database(model: str, settings: GatewaySettings) -> Database | None:
    """The database that the settings name; or the default one of this model, unless another server has it."""
    from headrace.gateway.state.database import BadState, Database

    if settings.state_dir is not None:
        return Database(settings.state_dir)
    try:
        return Database(config.home() / "state" / re.sub(r"[^A-Za-z0-9._-]", "-", model).strip(".")[:100])
    except BadState as error:
        print(f"\n  no files, batches or stored responses: {error}", file=sys.stderr)
        return None


def card_of(assembled: Assembled) -> Card:
    """What may be told of the model that writes."""
    from headrace.gateway.card import Card

    model = assembled.model
    return Card(
        assembled.name,
        family=model.family,
        parameters=model.parameters,
        weights_bytes=model.file_bytes,
        format=model.format,
        quantization=assembled.loaded.dtype.upper(),
        context_tokens=assembled.loaded.capacity.max_context_tokens,
        template=model.chat_template or "",
        loaded_s=clock.wall(),
    )
