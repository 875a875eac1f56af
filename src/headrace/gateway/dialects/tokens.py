"""/tokenize and /detokenize, in the shape that vLLM gave them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from headrace.gateway import bounds, shapes
from headrace.gateway.bounds import Body
from headrace.gateway.chain import Chat
from headrace.gateway.dialects.shared import One
from headrace.gateway.edge import Context, Dialect
from headrace.gateway.errors import bad
from headrace.gateway.openai import Message, _message
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.replies import error_body
from headrace.gateway.tokenization import Detokenize, Tokenize, Tokenized


class TokenizeRequest(Struct, kw_only=True):
    model: bounds.Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=bounds.Messages)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    tokens: Annotated[list[bounds.TokenId], Meta(max_length=1 << 20)]
    model: bounds.Name | None = None


class Tokens(Struct):
    count: int
    max_model_len: int  # most tokens of prompt and output
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Struct):
    prompt: str


TOKENIZE = Body(TokenizeRequest, frozenset(), {})
DETOKENIZE = Body(DetokenizeRequest, frozenset(), {})


def parse_tokenize(body: bytes, context: Context) -> tuple[Tokenize, One[Tokenized]]:
    """Raises Refused."""
    asked = TOKENIZE.decode(body)
    context = context.of(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise bad("Send either prompt or messages.", "prompt")
    if asked.add_special_tokens is False:
        raise bad("add_special_tokens: tokens are always those that the model would be given.", "add_special_tokens")

    def shape(event: Tokenized) -> Tokens:
        names = [context.text.token_bytes(one).decode(errors="replace") for one in event.ids]
        strs = names if asked.return_token_strs else None
        return Tokens(len(event.ids), context.to.max_context_tokens, list(event.ids), strs)

    what = Chat(tuple(map(_message, asked.messages))) if asked.messages else asked.prompt or ""
    return Tokenize(context.model, what), One(shape)


def parse_detokenize(body: bytes, context: Context) -> tuple[Detokenize, One[Tokenized]]:
    """Raises Refused."""
    asked = DETOKENIZE.decode(body)
    context = context.of(asked.model)
    return Detokenize(context.model, tuple(asked.tokens)), One(lambda event: Detokenized(event.text))


TOKENS = Dialect(
    Operation("/tokenize", "POST", "A prompt as token ids", {200: Answer(Tokens)}, shapes.Error, TOKENIZE),
    parse_tokenize,
    error_body,
)
TEXT = Dialect(
    Operation("/detokenize", "POST", "Token ids as text", {200: Answer(Detokenized)}, shapes.Error, DETOKENIZE),
    parse_detokenize,
    error_body,
)
