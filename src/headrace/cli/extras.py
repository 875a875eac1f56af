"""What a server has beside the models that write: an embedding model, a database for what outlives the process, and
cards that tell of its models."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.cli.assemble import Phases
from headrace.cli.house import ModelHouse
from headrace.cli.housing import Housing
from headrace.core import clock, config
from headrace.core.config import BadSetting, GatewaySettings
from headrace.core.ports import Service

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


def open_beside(housing: Housing, settings: GatewaySettings, phase: Phases, guard: Guard, limits: Store) -> Beside:
    """Raises BadState or BadModelFile if what the user named cannot be used; a default that is not here is left out."""
    from headrace.gateway.endpoints import Extras
    from headrace.gateway.explaining import Book

    batcher, words, cards = embedding_of(housing) or (None, None, ())
    database = open_database(housing.first.known.name, settings)
    phase.done()
    book = Book(housing.explanations, settings.explained, tracing_of(settings))
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


def model_of(housing: Housing, house: ModelHouse, settings: GatewaySettings, service: Service) -> Model:
    """A model as the gateway knows it."""
    from headrace.gateway.checks import Checks
    from headrace.gateway.models import Model

    known = house.known
    checks = Checks(known.grammars.check, settings.grammar_timeout_s)
    resident = housing.host.models[known.name]
    return Model(known.name, service, known.text, card_of(house), known.metrics, checks, resident)


def embedding_of(housing: Housing) -> tuple[Batcher, Words, tuple[Card, ...]] | None:
    from headrace.engine.embedding import Batcher
    from headrace.gateway.card import Card
    from headrace.gateway.embedding import Words

    found = housing.embedding
    if found is None:
        return None
    encoding = found.encoder.encoding
    card = Card(
        encoding.model,
        family=encoding.family,
        parameters=found.nbytes // 4,
        weights_bytes=found.nbytes,
        quantization="F32",
        context_tokens=encoding.max_tokens,
        embedding_dimensions=encoding.dimensions,
        loaded_s=clock.wall(),
    )
    return Batcher(found.encoder, _WAITING_TOKENS), Words(found.tokenizer_json), (card,)


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


def card_of(house: ModelHouse) -> Card:
    """What may be told of a model that writes."""
    from headrace.gateway.card import Card

    known = house.known
    facts = known.facts
    return Card(
        known.name,
        family=facts.family,
        parameters=facts.parameters,
        weights_bytes=facts.file_bytes,
        format=facts.format,
        quantization=known.expected.dtype.upper(),
        context_tokens=house.capacity.max_context_tokens,
        template=facts.chat_template or "",
        loaded_s=clock.wall(),
    )
