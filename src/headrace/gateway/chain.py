"""The one shape of the gateway: a handler takes a `Call` and streams `Event`s, as a service takes a request.

A wire format is translated to these values at the edge and nowhere else; everything between the edge and the service
(limits, logs, caches, the text itself) is a handler around a handler. This module owns no state.

    bytes -> dialect -> Call -> logged -> ... -> Generation -> Service
    bytes <- dialect <- Event <-       <- ... <-            <- Output
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from headrace.core.types import FinishReason, Grammar, RequestId, Sampling, TokenLogprob, Usage

T = TypeVar("T")
Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; somebody else runs it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)  # a JSON schema of its arguments, an object
    strict: bool = False  # calls are held to the schema even where the model need not call


@dataclass(frozen=True, slots=True)
class Tools:
    offered: tuple[Tool, ...] = ()
    must: bool = False  # the answer is calls and nothing else
    named: str | None = None  # with `must`: of this tool
    parallel: bool = True  # more than one call in an answer


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that the model's chat template turns into one prompt.

    A message has "role" (system, user, assistant or tool) and "content", a string; an assistant's may have
    "reasoning_content" and "tool_calls", [{"id", "type": "function", "function": {"name", "arguments"}}], with the
    arguments as a mapping or, where they are no JSON object, as the string they were; a tool's has "tool_call_id".
    """

    messages: tuple[Mapping[str, Any], ...]
    options: Mapping[str, bool] = field(default_factory=dict)  # template variables that a client may set
    tools: Tools = Tools()


@dataclass(frozen=True, slots=True)
class Call:
    """What a client wants, in no dialect. It yields len(prompts) x `choices` choices, numbered prompt by prompt."""

    id: RequestId
    asked: Chat | tuple[Prompt, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None  # per choice; None: what is left of the context
    choices: int = 1  # per prompt
    grammar: Grammar | None = None  # what the answer must be
    thinking_tokens: int | None = None  # most tokens of reasoning before the answer; needs a model that reasons
    answer_tokens: int | None = None  # most tokens after the reasoning; `max_new_tokens` bounds both together
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    model: str = ""
    tenant: str = ""
    cache_salt: str = ""  # calls with different salts share no KV
    priority: int = 0  # larger goes first, when the ordering asks
    weight: float = 1.0  # of its tenant, when the ordering shares fairly
    deadline_s: float | None = None  # seconds from now after which the call ends unfinished
    client_id: str = ""  # the X-Request-Id of the response
    keep_alive_s: float | None = None  # how long the model stays in memory when nobody uses it; 0: it goes now


@dataclass(frozen=True, slots=True)
class Began:
    """The first event, sent with the first token: until then a call can still be refused as a whole."""

    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ToolPiece:
    """Some of a tool call: its id and name come first and once, its arguments in pieces of JSON text."""

    index: int  # of the call in its choice
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to one choice. Text never ends inside a character or inside a possible stop string, and
    reasoning comes before text and calls."""

    choice: int
    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolPiece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens whose text has been released
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # for prompt positions 1.., in order
    finish: FinishReason | None = None  # STOP or LENGTH, on the choice's last piece
    called: bool = False  # with `finish`: STOP because it has called tools
    stop_string: str | None = None  # with `finish`: the stop string that ended the text


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event. Usage is summed over choices, but a prompt shared by several choices counts once."""

    usage: Usage
    reasoning_tokens: int = 0  # of the output


def request_ids(call: Call) -> tuple[RequestId, ...]:
    """What the service calls its choices, in order."""
    many = call.choices * (1 if isinstance(call.asked, Chat) else len(call.asked))
    return (call.id,) if many == 1 else tuple(f"{call.id}-{at}" for at in range(many))


Event = Began | Piece | Ended
Handler = Callable[[Call], AsyncIterator[Event]]


@asynccontextmanager
async def closing(events: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close an iterator however the block ends: leaving one half-read is how a client that went away is told on."""
    try:
        yield events
    finally:
        aclose = getattr(events, "aclose", None)
        if aclose is not None:
            await aclose()


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """Items of all streams in the order they appear. The first failure closes the others and is raised."""
    if len(streams) == 1:
        async with closing(streams[0]) as only:
            async for item in only:
                yield item
        return
    ready: asyncio.Queue[T | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, ready)) for stream in streams]
    try:
        open_streams = len(tasks)
        while open_streams:
            match await ready.get():
                case None:
                    open_streams -= 1
                case BaseException() as error:
                    raise error
                case item:
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncIterator[T], ready: asyncio.Queue[T | BaseException | None]) -> None:
    try:
        async with closing(stream) as items:
            async for item in items:
                ready.put_nowait(item)
    except Exception as error:
        ready.put_nowait(error)
    else:
        ready.put_nowait(None)
