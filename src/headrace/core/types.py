"""What a request is and what comes back: values only, no behaviour beyond their own bounds.

A prompt is a list of segments. A trace knows only how long a stretch is (`Blank`); a client sends tokens (`Tokens`).
`Output` is a delta with a reason; text exists only in the gateway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

RequestId = str
BlockKey = int  # names the content of one full KV block and of everything before it; see `core.keys`


class HeadraceError(Exception):
    """Anything Headrace refuses with a sentence the user can act on."""


class InvalidRequest(HeadraceError):
    """The request can never be served as it is. `param` names the offending field of the wire format, if known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(HeadraceError):
    """The queue is full. `retry_after_s` is when the queue should have drained enough, by its measured rate."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(HeadraceError):
    """The replica cannot take requests now: starting, draining or failed. `retry_after_s`: when that should be over."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        """None where nobody can know."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Tokens:
    """A stretch of prompt whose token ids are known."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Blank:
    """A stretch of prompt of known length and unknown content, as a trace gives it."""

    tokens: int

    def __len__(self) -> int:
        return self.tokens


Segment = Tokens | Blank


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn from the logits, in the order written here.

    repetition (divides or multiplies, CTRL), presence and frequency (subtracts, OpenAI), logit_bias, temperature,
    then the filters top_k, top_p and min_p on what is left. The draw for output position i depends on `seed` and i
    only, never on what else is in the batch.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this
    top_k: int = 0  # keep this many; 0 keeps all
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int = 0  # the gateway draws one when the client gives none
    logprobs: int | None = None  # None: none; k: of the drawn token and of the k likeliest
    prompt_logprobs: int | None = None  # the same for prompt positions; such a request reads no cached prefix


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the answer must be, in one of three notations. Such an answer ends where its grammar ends, with a stop
    token, or is cut by the length."""

    kind: str  # "json_schema", "regex" or "lark"
    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """Reasoning before the answer, with a budget of its own (Elastic Reasoning, 2505.05315).

    <think> a b c d </think> answer      after `budget_tokens` the `closing_ids` are forced, one a step
    `begun`: from a on                   a grammar governs what comes after the closing mark
    """

    opening: str  # the mark that begins it
    closing: str  # the mark that ends it
    begun: bool  # the prompt ends inside it
    budget_tokens: int | None = None
    closing_ids: tuple[int, ...] = ()  # tokens that end it: the closing mark and the white space around it
    opening_id: int | None = None  # the token that is the opening mark, if it is one


@dataclass(frozen=True, slots=True)
class SLO:
    """What the client was promised. None is no promise. Goodput counts requests that kept every promise."""

    ttft_s: float | None = None  # time to first token
    tpot_s: float | None = None  # (end-to-end minus TTFT) / (output tokens minus 1)

    def times(self, factor: float) -> SLO:
        """Promises of so many times these seconds."""
        return SLO(self.ttft_s and self.ttft_s * factor, self.tpot_s and self.tpot_s * factor)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. The gateway turns `n` choices into n requests."""

    id: RequestId
    prompt: tuple[Segment, ...]
    arrival_s: float  # on the clock of `core.clock.now`
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()  # drawing one of these ends the request; it is the last token
    block_keys: tuple[BlockKey, ...] = ()  # of the full prompt blocks; empty: shares nothing
    salt: bytes = b""  # what the chain of `block_keys` started from, so that generated blocks continue it
    priority: int = 0  # larger goes first, when the ordering asks
    tenant: str = ""
    weight: float = 1.0  # of the tenant, where the ordering shares fairly and its settings name no other
    model: str = ""
    adapter: str | None = None
    slo: SLO | None = None
    deadline_s: float | None = None  # absolute; past it the request ends with FinishReason.DEADLINE
    grammar: Grammar | None = None
    thinking: Thinking | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompt))

    def prompt_ids(self) -> tuple[int, ...] | None:
        """All token ids of the prompt, or None if some segment is blank."""
        ids: list[int] = []
        for segment in self.prompt:
            if isinstance(segment, Blank):
                return None
            ids.extend(segment.ids)
        return tuple(ids)


class FinishReason(StrEnum):
    """Why a request ended. Exactly one is reported per request, always."""

    STOP = "stop"  # a stop token, or the gateway saw a stop string
    LENGTH = "length"  # max_new_tokens or the context length
    ABORT = "abort"  # the client went away or said so
    DEADLINE = "deadline"
    ERROR = "error"  # the step failed; the message says why
    INVALID = "invalid"  # it cannot be served as it is, which showed only now; the message says why


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities at one position: the model's own, before penalties, bias, temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache when the request was first admitted
    preemptions: int = 0


class Output(NamedTuple):
    """What one step (or an abort, a deadline, a failure) added to one request. A tuple: quick to make."""

    request_id: RequestId
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, when asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # for prompt positions 1.., in order, as chunks complete
    finish: FinishReason | None = None  # set on the last output only
    usage: Usage | None = None  # with `finish`
    error: str | None = None  # with FinishReason.ERROR and INVALID
