"""A handler around a handler: conversations that the server remembers.

A turn names the response it continues; its messages are put before the new ones. What was answered is kept before the
client learns that it is complete. The conversation is kept in core messages, the response as the bytes it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headrace.gateway.chain import Call, Chat, Event, Handler, closing
from headrace.gateway.errors import Refused

Messages = tuple[Mapping[str, Any], ...]


class Answering(Protocol):
    """The reply of a turn, read when all events have gone through it."""

    @property
    def message(self) -> Mapping[str, Any]: ...

    def body(self) -> bytes: ...


class Memory(Protocol):
    """Keeps responses; see `state.responses`."""

    async def conversation(self, tenant: str, response_id: str) -> Messages | None:
        """All messages up to and with this response; None if it, or one before it, is not here."""
        ...

    async def keep(
        self, tenant: str, response_id: str, previous: str | None, messages: Messages, body: bytes
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """A call that may continue an earlier one and may be continued."""

    call: Call  # its chat is the new part, instructions included
    said: Messages  # the new part without instructions, which hold for one turn
    previous: str | None
    answer: Answering | None  # to keep; None: nothing is kept


def remembered(handler: Handler, memory: Memory | None) -> Any:
    async def answer(turn: Turn) -> AsyncIterator[Event]:
        call = await _continued(turn, memory)
        async with closing(handler(call)) as events:
            async for event in events:
                yield event
        if memory is not None and turn.answer is not None:
            said = (*turn.said, turn.answer.message)
            await memory.keep(call.tenant, call.id, turn.previous, said, turn.answer.body())

    return answer


async def _continued(turn: Turn, memory: Memory | None) -> Call:
    call, chat = turn.call, turn.call.asked
    assert isinstance(chat, Chat)
    if turn.previous is None:
        return call
    before = await memory.conversation(call.tenant, turn.previous) if memory else None
    if before is None:
        message = f"Previous response with id {turn.previous!r} not found."
        raise Refused(400, message, code="previous_response_not_found", param="previous_response_id")
    head = chat.messages[: len(chat.messages) - len(turn.said)]
    return replace(call, asked=replace(chat, messages=(*head, *before, *turn.said)))
