"""OpenAI's /v1/embeddings. `truncate` is an extension: without it, a text that is too long is refused."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from headrace.gateway import bounds, shapes
from headrace.gateway.bounds import Body
from headrace.gateway.chain import Prompt
from headrace.gateway.dialects.shared import One, check_model
from headrace.gateway.edge import Context, Dialect
from headrace.gateway.embedding import Embed, Embedded
from headrace.gateway.errors import bad
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.replies import error_body

MOST_INPUTS = 2048  # texts of one request, as at OpenAI
Texts = Annotated[list[str], Meta(max_length=MOST_INPUTS)]
Ids = Annotated[list[bounds.TokenId], Meta(max_length=1 << 16)]


class EmbeddingRequest(Struct, kw_only=True):
    input: str | Annotated[list[str | bounds.TokenId | Ids], Meta(min_length=1, max_length=1 << 16)]
    model: bounds.Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    truncate: bool | None = None


class Vector(Struct):
    index: int
    embedding: list[float] | str  # base64 of float32, little-endian
    object: Literal["embedding"] = "embedding"


class Spent(Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    data: list[Vector]
    model: str
    usage: Spent
    object: Literal["list"] = "list"


BODY = Body(EmbeddingRequest, frozenset({"user"}), {})


def parse(body: bytes, context: Context) -> tuple[Embed, One[Embedded]]:
    """Raises Refused."""
    asked = BODY.decode(body)
    check_model(asked.model, context.embedding_model)
    context.caller.check_model(context.embedding_model or "")
    inputs = _inputs(asked.input)
    shown: Callable[[tuple[float, ...]], Any] = _base64 if asked.encoding_format == "base64" else list

    def shape(event: Embedded) -> Embeddings:
        data = [Vector(at, shown(vector)) for at, vector in enumerate(event.vectors)]
        return Embeddings(data, context.embedding_model or "", Spent(event.prompt_tokens, event.prompt_tokens))

    return Embed(inputs, bool(asked.truncate), asked.dimensions), One(shape)


def _inputs(given: str | list[Any]) -> tuple[Prompt, ...]:
    """The four forms of an input: text, texts, token ids, lists of token ids."""
    if isinstance(given, str):
        return (given,)
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise bad("input: expected texts, token ids or lists of token ids, not a mixture.", "input")
    if kinds == {int}:
        return (tuple(given),)
    if len(given) > MOST_INPUTS:
        raise bad(f"input: {len(given)} texts are more than {MOST_INPUTS}; send several requests.", "input")
    return tuple(item if isinstance(item, str) else tuple(item) for item in given)


def _base64(vector: tuple[float, ...]) -> str:
    """float32, little-endian."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


DIALECT = Dialect(
    Operation("/v1/embeddings", "POST", "Vectors of texts", {200: Answer(Embeddings)}, shapes.Error, BODY),
    parse,
    error_body,
)
