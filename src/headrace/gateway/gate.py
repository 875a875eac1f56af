"""Between the edge and every handler: takes from the caller's account what a call may come to, watches what it uses,
and settles when it is over, however that is. So it covers every dialect, and the lines of batches.

    entered -> take -> handler's events, watched -> settle -> the last bytes go out

A call that the server refuses for its own reasons (429, 5xx) costs nothing. One that its client leaves pays its prompt
and what was streamed until then. Owns nothing; accounts are in a `limits.Store`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from headrace.core.types import Overloaded, Unavailable
from headrace.gateway.chain import Began, Call, Chat, Ended, Piece, Prompt, closing
from headrace.gateway.embedding import Embed, Embedded
from headrace.gateway.errors import Refused
from headrace.gateway.keys import Caller
from headrace.gateway.limits import Denied, Limits, Standing, Store, Ticket
from headrace.gateway.turns import Turn

E = TypeVar("E")
CHARS_PER_TOKEN = 4  # of a prompt, until its tokens are counted
UNSAID_TOKENS = 256  # that an answer is taken to have when its call does not bound it
_UNLIMITED = Limits()


@dataclass(slots=True)
class Permit:
    """One call that was let in."""

    prompt_tokens: int  # as far as it is known
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    output_tokens: int = 0
    began: bool = False

    @property
    def used_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    async def watched(self, events: AsyncIterator[E]) -> AsyncIterator[E]:
        """The same events, and their tokens are counted: one a piece, until the end tells exactly."""
        async with closing(events) as seen:
            async for event in seen:
                self._note(event)
                yield event

    def _note(self, event: Any) -> None:
        self.began = True
        match event:
            case Began():
                self.prompt_tokens = sum(map(len, event.prompts))
            case Piece():
                self.output_tokens += 1
            case Ended():
                self.prompt_tokens, self.output_tokens = event.usage.prompt_tokens, event.usage.output_tokens
            case Embedded():
                self.prompt_tokens = event.prompt_tokens


@dataclass(frozen=True, slots=True)
class Gate:
    store: Store

    @asynccontextmanager
    async def entered(self, caller: Caller, call: Any) -> AsyncIterator[Permit]:
        """Raises Refused."""
        prompt, answer = priced(call)
        permit = Permit(prompt)
        if caller.key is None or caller.key.limits == _UNLIMITED:
            yield permit
            return
        ticket = await self._take(caller.key.id, caller.key.limits, prompt + answer)
        permit.headers = headers(ticket.limits, ticket.standing)
        counts, used = True, None
        try:
            yield permit
        except Exception as error:
            counts = not _servers_fault(error)
            used = permit.used_tokens if permit.began else 0
            raise
        finally:
            await self.store.settle(ticket, permit.used_tokens if used is None else used, counts)

    async def _take(self, key_id: str, limits: Limits, tokens: int) -> Ticket:
        try:
            return await self.store.take(key_id, limits, tokens)
        except Denied as denied:
            raise refusal(denied, limits, tokens) from denied


def ranked(call: Any, caller: Caller) -> Any:
    """The same with the priority and the weight that the caller's key gives it."""
    if caller.key is None:
        return call
    match call:
        case Call():
            return replace(call, priority=caller.priority(call.priority), weight=caller.key.weight)
        case Turn():
            return replace(call, call=ranked(call.call, caller))
    return call


def priced(call: Any) -> tuple[int, int]:
    """Tokens of the prompts and of the answers that a call may come to. Exact where it has token ids and bounds."""
    match call:
        case Turn():
            return priced(call.call)
        case Call():
            most = UNSAID_TOKENS if call.max_new_tokens is None else call.max_new_tokens
            if isinstance(call.asked, Chat):
                said = [str(message.get("content") or "") for message in call.asked.messages]
                return _tokens(*said), most * call.choices
            return _tokens(*call.asked), most * call.choices * len(call.asked)
        case Embed():
            return _tokens(*call.inputs), 0
    return 0, 0


def _tokens(*prompts: Prompt) -> int:
    return sum(-(-len(one) // CHARS_PER_TOKEN) if isinstance(one, str) else len(one) for one in prompts)


def _servers_fault(error: Exception) -> bool:
    if isinstance(error, Refused):
        return error.status == 429 or error.status >= 500
    return isinstance(error, Overloaded | Unavailable) or not hasattr(error, "param")


def refusal(denied: Denied, limits: Limits, tokens: int) -> Refused:
    """As OpenAI says it: 429 with a time, 429 without one when the budget is spent, 400 for what is larger than a
    minute's worth."""
    more = tuple(headers(limits, denied.standing))
    match denied.what:
        case "size":
            message = (
                f"This call may come to {tokens} tokens, and the key may use {limits.tokens_per_minute} per minute; "
                "shorten the prompt or lower max_tokens."
            )
            return Refused(400, message, code="tokens_limit_exceeded", param="max_tokens", more=more)
        case "budget" if denied.retry_after_s is None:
            message = f"The budget of this key, {limits.budget_tokens} tokens, does not allow {tokens} more."
            return Refused(429, message, code="insufficient_quota", more=more)
        case "store":
            message = "The limits of this key cannot be looked up now. Try again."
            return Refused(503, message, code="limits_unavailable", retry_after_s=denied.retry_after_s)
    most = {
        "requests": f"{limits.requests_per_minute} requests per minute",
        "tokens": f"{limits.tokens_per_minute} tokens per minute, of which this call may take {tokens}",
        "concurrency": f"{limits.concurrency} calls at once",
        "budget": f"{limits.budget_tokens} tokens altogether, some of which calls under way have reserved",
    }[denied.what]
    seconds = math.ceil(denied.retry_after_s or 1)
    message = f"This key may use {most}; try again in {seconds} s."
    return Refused(429, message, code="rate_limit_exceeded", retry_after_s=denied.retry_after_s, more=more)


def headers(limits: Limits, standing: Standing) -> list[tuple[bytes, bytes]]:
    """OpenAI's x-ratelimit-*, of the limits per minute that there are."""
    rows = (
        ("requests", limits.requests_per_minute, standing.requests, standing.requests_s),
        ("tokens", limits.tokens_per_minute, standing.tokens, standing.tokens_s),
    )
    found = []
    for name, most, left, reset_s in rows:
        if most is not None:
            values = {"limit": str(most), "remaining": str(max(0, math.floor(left))), "reset": lasting(reset_s)}
            found += [(f"x-ratelimit-{what}-{name}".encode(), value.encode()) for what, value in values.items()]
    return found


def lasting(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 7s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(1e3 * seconds)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
