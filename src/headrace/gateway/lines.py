"""A handler around a handler: notes each call in the book of explanations, and writes one line about it to the log when
it is over, whatever became of it. Prompts and answers are never in a line.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from headrace.core import clock
from headrace.core.explain import words
from headrace.core.types import Usage
from headrace.gateway.chain import Call, Ended, Event, Handler, Piece, closing, request_ids
from headrace.gateway.errors import LOG, Refused
from headrace.gateway.explaining import Book, Note


def logged(handler: Handler, book: Book) -> Handler:
    async def call_and_log(call: Call) -> AsyncIterator[Event]:
        note = Note(call.id, call.client_id, call.tenant, call.model, request_ids(call), clock.now())
        book.begin(note)
        first_s: float | None = None
        usage, outcome = Usage(0, 0, 0), "gone"
        reasons: list[str] = []
        try:
            async with closing(handler(call)) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        first_s = clock.now() if first_s is None else first_s
                        if event.finish is not None:
                            reasons.append(event.finish)
                    elif isinstance(event, Ended):
                        usage, outcome = event.usage, "+".join(sorted(set(reasons)))
                    yield event
        except Refused as error:
            outcome = f"refused-{error.status}"
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            note.end_s = clock.now()
            note.refused = None if reasons or outcome == "gone" else outcome
            _log(call, note, book, usage, outcome, None if first_s is None else first_s - note.began_s)

    return call_and_log


def _log(call: Call, note: Note, book: Book, usage: Usage, outcome: str, ttft_s: float | None) -> None:
    now = clock.now()
    spent = book.times(note, now)
    waited = words.short(spent) if spent is not None else ""
    LOG.info(
        "%s%s prompt=%d cached=%d output=%d%s ttft=%s total=%.3fs finish=%s",
        call.id,
        f" request={call.client_id}" if call.client_id else "",
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        ""
        if spent is None
        else f" queue={1e3 * spent.queue_s:.0f}ms prefill={1e3 * spent.prefill_s:.0f}ms "
        f"decode={1e3 * spent.decode_s:.0f}ms preempted={spent.preemptions}",
        "-" if ttft_s is None else f"{ttft_s:.3f}s",
        now - note.began_s,
        f"{outcome} waited-for={waited.replace(' ', '-')}" if waited else outcome,
    )
