"""The table of bounds: every field a client may send, how large it may be, and what happens to the others.

Bounds are types, so one decoder enforces them, and the same annotations describe them in the published document. A
field is served, ignored because it cannot change the answer, or refused by name. Nothing is dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from headrace.gateway.errors import Refused, bad

S = TypeVar("S", bound=msgspec.Struct)

MAX_HEAD_BYTES = 32 << 10  # request line and headers
BODY_TIMEOUT_S = 30.0  # from the end of the headers to the end of the body
MAX_TOKEN_ID = (1 << 31) - 1

Temperature = Annotated[float, Meta(ge=0, le=2, description="0 is greedy")]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=1_000_000, description="0 and -1 keep all tokens")]
MinP = Annotated[float, Meta(ge=0, le=1)]
Repetition = Annotated[float, Meta(gt=0, le=10, description="1 is off")]
Penalty = Annotated[float, Meta(ge=-2, le=2, description="0 is off")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TokenKey = Annotated[str, Meta(pattern=r"^[0-9]{1,9}$", description="a token id")]
LogitBias = Annotated[dict[TokenKey, Bias], Meta(max_length=1024)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Choices = Annotated[int, Meta(ge=1, le=4096, description="bounded further by --max-choices")]
MaxTokens = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID, description="0 only with echo")]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
StopTokens = Annotated[list[TokenId], Meta(max_length=256)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Meta(max_length=16)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Salt = Annotated[str, Meta(max_length=256)]
Priority = Annotated[int, Meta(ge=-100, le=100, description="larger goes first under --ordering priority")]
Deadline = Annotated[float, Meta(gt=0, le=86_400, description="seconds after which the request ends with 504")]
Messages = 65_536  # most messages of a conversation; its size is bounded by --max-body
Parts = 4_096  # most parts of one message
Prompts = 4_096  # most prompts of a completion; bounded further by --max-choices

# Accepted and without effect: they steer accounting or storage at other providers, never the answer.
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention"
    " parallel_tool_calls".split()
)

# Refused by name, unless absent, null, or one of the values that ask for nothing.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "suffix": ("",),
    "best_of": (1,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "chat_template": (),
}

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode(decoder: msgspec.json.Decoder[S], body: bytes) -> S:
    """A request body as a checked value. Raises Refused with the offending field as `param`."""
    try:
        body.decode()  # also what the decoder would skip
        served = {field.encode_name for field in msgspec.structs.fields(decoder.type)}
        for name, raw in _FIELDS.decode(body).items():
            if name not in served and name not in IGNORED:
                _refuse_field(name, raw)
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _violation(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad(f"The request body is not valid JSON in UTF-8: {reason}.", code="invalid_json") from error


def _refuse_field(name: str, raw: msgspec.Raw) -> None:
    shown = name[:64]
    if name not in REFUSED:
        raise bad(f"Unknown field {shown!r}.", shown, "unknown_field")
    value = msgspec.json.decode(raw)
    if value is not None and not any(type(value) is type(off) and value == off for off in REFUSED[name]):
        raise bad(f"The field {shown!r} is not supported by this server.", shown, "unsupported_field")


def _violation(message: str) -> Refused:
    """msgspec says 'Expected `float` <= 2.0 - at `$.temperature`'; the API names the field first."""
    sentence, _, place = message.partition(" - at ")
    path = re.sub(r"^(?:`key` in )?`\$\.?|`$", "", place)[:100]
    param = re.split(r"[.\[]", path)[0] or None
    return bad(f"{path}: {sentence.lower()}." if path else f"{sentence}.", param, "invalid_value")
