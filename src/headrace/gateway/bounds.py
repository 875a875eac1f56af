"""The table of bounds: every field a client may send, how large it may be, and what happens to the others.

Bounds are types, so one decoder enforces them, and the same annotations describe them in the published document (see
`openapi`). A dialect's `Body` says which fields it serves, which it ignores because they cannot change the answer, and
which it refuses by name. Nothing is dropped silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

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
ThinkingTokens = Annotated[
    int, Meta(ge=0, le=MAX_TOKEN_ID, description="most tokens of reasoning; the answer then begins")
]
AnswerTokens = Annotated[int, Meta(ge=1, le=MAX_TOKEN_ID, description="most tokens after the reasoning")]
ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
ToolText = Annotated[str, Meta(max_length=1 << 16)]
CallId = Annotated[str, Meta(min_length=1, max_length=256)]
Arguments = Annotated[str, Meta(max_length=1 << 20, description="JSON text")]
SchemaName = Annotated[str, Meta(min_length=1, max_length=64)]
GrammarText = Annotated[str, Meta(min_length=1, max_length=1 << 18)]
RegexText = Annotated[str, Meta(min_length=1, max_length=1 << 16)]
ChoiceText = Annotated[str, Meta(min_length=1, max_length=4096)]
ChoiceTexts = Annotated[list[ChoiceText], Meta(min_length=1, max_length=4096)]
KeepAlive = (
    Annotated[float, Meta(ge=-1e9, le=1e9)]
    | Annotated[str, Meta(pattern=r"^(-?[0-9]{1,9}|-?([0-9]{1,9}(\.[0-9]{1,6})?(ms|s|m|h)){1,4})$", max_length=64)]
)
Tools = 128  # most tools of a conversation
Calls = 1024  # most tool calls of one message
SchemaDepth = 64  # deepest nesting of a JSON schema or of any other free-form value
SchemaItems = 100_000  # most values in one, counted at every depth
Messages = 65_536  # most messages of a conversation; its size is bounded by --max-body
Parts = 4_096  # most parts of one message
Prompts = 4_096  # most prompts of a completion; bounded further by --max-choices

# Accepted and without effect: they steer accounting or storage at other providers, never the answer.
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention".split()
)

# Refused by name, unless absent, null, or one of the values that ask for nothing.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "suffix": ("",),
    "best_of": (1,),
    "chat_template": (),
    "logits_processors": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_embeds": (),
}

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Body(Generic[S]):
    """The body of one kind of request: `kind` has the fields that are served, with their bounds."""

    kind: type[S]
    ignored: frozenset[str] = IGNORED
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: REFUSED)
    _decoder: msgspec.json.Decoder[S] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_decoder", msgspec.json.Decoder(self.kind))

    @property
    def served(self) -> frozenset[str]:
        return frozenset(one.encode_name for one in msgspec.structs.fields(self.kind))

    def decode(self, body: bytes) -> S:
        """A checked value. Raises Refused with the offending field as `param`."""
        try:
            body.decode()  # also what the decoder would skip
            served = self.served
            for name, raw in _FIELDS.decode(body).items():
                if name not in served and name not in self.ignored:
                    self._refuse_field(name, raw)
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _violation(str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise bad(f"The request body is not valid JSON in UTF-8: {reason}.", code="invalid_json") from error

    def _refuse_field(self, name: str, raw: msgspec.Raw) -> None:
        shown = name[:64]
        if name not in self.refused:
            raise bad(f"Unknown field {shown!r}.", shown, "unknown_field")
        value = msgspec.json.decode(raw)
        if value is not None and not any(type(value) is type(off) and value == off for off in self.refused[name]):
            raise bad(f"The field {shown!r} is not supported by this server.", shown, "unsupported_field")


def check_free(value: Any, param: str) -> None:
    """Bound a value of free form, such as a JSON schema: its depth and the number of values in it. Raises Refused."""
    level, count = [value], 0
    for _ in range(SchemaDepth + 1):
        count += len(level)
        if count > SchemaItems:
            raise bad(f"{param}: more than {SchemaItems:,} values in one.", param, "invalid_value")
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise bad(f"{param}: nested deeper than {SchemaDepth} levels.", param, "invalid_value")


_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_alive_s(given: float | str | None) -> float | None:
    """Seconds that a model stays in memory unused: 300, "5m", "1h30m"; what is negative is for ever."""
    if given is None:
        return None
    parts = re.findall(r"([0-9.]+)(ms|s|m|h)", given) if isinstance(given, str) else []
    if parts:
        seconds = sum(float(count) * _UNITS_S[unit] for count, unit in parts)
        return math.inf if str(given).startswith("-") and seconds else seconds
    return math.inf if float(given) < 0 else float(given)


def _violation(message: str) -> Refused:
    """msgspec says 'Expected `float` <= 2.0 - at `$.temperature`'; the API names the field first."""
    sentence, _, place = message.partition(" - at ")
    path = re.sub(r"^(?:`key` in )?`\$\.?|`$", "", place)[:100]
    param = re.split(r"[.\[]", path)[0] or None
    return bad(f"{path}: {sentence.lower()}." if path else f"{sentence}.", param, "invalid_value")
