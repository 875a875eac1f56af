"""The shapes of what OpenAI's endpoints answer: types only, for the published document and for whole answers.

A field that may be absent has the type `UnsetType`; one that may be null says None.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct):
    error: ErrorDetail


class PromptDetails(Struct):
    cached_tokens: int


class OutputDetails(Struct):
    reasoning_tokens: int


class Spent(Struct):
    """The usage of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: OutputDetails


class TopToken(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopToken]


class ChatLogprobs(Struct):
    content: list[TokenLogprobs] | None
    refusal: None = None


class FunctionCall(Struct):
    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


FinishText = Literal["stop", "length", "tool_calls"]


class ChatMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishText


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Spent


class FunctionDelta(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishText | None


class ChatChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Spent | UnsetType | None = UNSET


class CompletionLogprobs(Struct):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None  # null in all but the last chunk of a stream


class Completion(Struct, kw_only=True):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Spent | UnsetType | None = UNSET


class Model(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headrace"
    max_model_len: int  # most tokens of prompt and output
    state: Literal["cold", "loading", "ready", "yielding", "unloading"] = "ready"
    loaded: float = 1.0  # what share of it is in memory, 0 to 1
    memory_bytes: int | None = None  # that it takes: weights, activations and KV; of a cold one, KV that was kept
    error: str | None = None  # why it could not be loaded the last time


class Models(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class ModelHealth(Struct):
    status: Literal["ready", "stalled", "restarting", "draining", "failed"]
    model: str
    running: int
    waiting: int
    steps: int
    seconds_since_progress: float
    error: str | None = None  # why it is neither ready nor draining
    restarts: int = 0  # of the process that computes
    violations: int = 0  # of invariants, found when nothing was to do
    state: Literal["cold", "loading", "ready", "yielding", "unloading"] = "ready"


class Health(Struct):
    """Of all models together, under the name of the first. Where keys are asked for, only admins learn more than the
    status."""

    status: Literal["ready", "stalled", "restarting", "draining", "failed"]
    model: str | UnsetType = UNSET
    running: int | UnsetType = UNSET
    waiting: int | UnsetType = UNSET
    steps: int | UnsetType = UNSET
    seconds_since_progress: float | UnsetType = UNSET
    error: str | UnsetType | None = UNSET
    restarts: int | UnsetType = UNSET
    violations: int | UnsetType = UNSET
    models: list[ModelHealth] | UnsetType = UNSET


class Index(Struct):
    name: str
    version: str
    paths: dict[str, str]


class Who(Struct):
    """Another request, as far as the caller may know of it."""

    whose: Literal["own", "other"]  # of the same tenant, or of another
    request_id: str | None  # null: nobody's business
    tenant: str | None  # its name, for an admin
    prompt_tokens: int | None


class Blame(Struct):
    other: Who
    ms: float


class ExplainedPhase(Struct):
    """A stay in the queue, in prefill or in decoding, from `begin_ms` after the request came."""

    kind: Literal["queue", "prefill", "decode"]
    begin_ms: float
    ms: float
    steps: int
    steps_with_prompts: int
    prompts_ms: float  # in steps that computed prompts of others
    other_tenants_prompts_ms: float  # of these, of other tenants
    slowed_ms: float  # decoding: by which prompts of others made it longer
    other_tenants_slowed_ms: float
    places_ms: float  # queue: all places for running requests were taken
    memory_ms: float  # queue: too little memory for KV was free
    policy_ms: float  # queue: the admission policy held it back
    causes: list[Blame]  # the worst first


class ExplainedChunk(Struct):
    """Tokens of the prompt that were computed in one step, or in neighbouring ones."""

    step: int
    steps: int
    begin_ms: float
    ms: float
    tokens: int


class ExplainedPreemption(Struct):
    at_ms: float
    reason: str
    to: Who | None
    lost_tokens: int


RequestState = Literal["waiting", "prefilling", "decoding", "finished"]


class ExplainedChoice(Struct):
    """What became of one choice of a call, and why."""

    id: str
    state: RequestState
    words: list[str]
    prompt_tokens: int
    cached_tokens: int
    cache_miss: str
    output_tokens: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    total_ms: float
    ttft_ms: float | None
    requests_ahead: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    finish: str | None
    phases: list[ExplainedPhase]
    chunks: list[ExplainedChunk]
    preempted: list[ExplainedPreemption]


class Explained(Struct, kw_only=True):
    """Where the time of a request went."""

    id: str
    object: Literal["request.explanation"] = "request.explanation"
    request_id: str  # the x-request-id of its response
    model: str
    tenant: str | None
    created: float  # when it came, in Unix time
    state: RequestState
    words: list[str]  # of its first choice, or why it was refused
    before_ms: float  # in the gateway, before it was queued: the body, the template, tokens, a model that loads
    total_ms: float  # in the whole server
    refused: str | None  # an error that ended it before it was queued
    choices: list[ExplainedChoice]


class RequestRow(Struct, kw_only=True):
    id: str
    request_id: str
    model: str
    tenant: str | None
    state: RequestState
    created: float  # Unix time
    choices: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float | None
    total_ms: float
    preemptions: int
    finish: str | None
    waits_for: str  # the main reason for its time in the queue, in a few words; may be empty


class RequestRows(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[RequestRow]  # live ones first, then finished ones, the last first
    has_more: bool


class StepRow(Struct, kw_only=True):
    model: str
    step: int
    repetitions: int
    ended: float  # Unix time
    ms: float  # all repetitions
    requests: int
    tokens: int  # of one repetition
    running: int
    waiting: int
    prompts: int  # requests beside those that only decode
    used_blocks: int
    total_blocks: int
    held: Literal["", "places", "memory", "policy"]  # why the next one could not start


class KvMemory(Struct):
    """The KV blocks of one model."""

    model: str
    block_tokens: int
    total_blocks: int
    used_blocks: int
    cached_blocks: int  # used by nobody, with KV worth finding; the rest is free


class StepRows(Struct, kw_only=True):
    object: Literal["list"] = "list"
    now: float  # Unix time
    memory: list[KvMemory]
    data: list[StepRow]  # the oldest first
