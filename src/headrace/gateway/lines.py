"""What is said about every request when it is over: one line in the log, and the header `Server-Timing`. Prompts,
answers and keys are never in either. Notes each call in the book of explanations on the way; owns nothing itself.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator

from starlette.types import Scope

from headrace.core import clock
from headrace.core.explain import words
from headrace.core.explain.told import Times
from headrace.core.types import HeadraceError, Usage
from headrace.gateway.chain import Call, Ended, Event, Handler, Piece, closing, request_ids
from headrace.gateway.errors import LOG, Refused
from headrace.gateway.explaining import Book, Note, Visit

_QUIET = ("/health", "/metrics", "/v1/requests", "/v1/steps", "/page", "/openapi.json")  # asked every few seconds


def logged(handler: Handler, book: Book, is_ready: Callable[[str], bool] = lambda _: True) -> Handler:
    """A handler around a handler: a note in the book, and a line when the call is over, whatever became of it.
    `is_ready` says of a model's name whether it is in memory."""

    async def call_and_log(call: Call) -> AsyncIterator[Event]:
        names, ready = request_ids(call), is_ready(call.model)
        note = Note(call.id, call.client_id, call.tenant, call.model, names, clock.now(), ready)
        book.begin(note)
        usage, outcome = Usage(0, 0, 0), "gone"
        reasons: list[str] = []
        try:
            async with closing(handler(call)) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        note.first_s = clock.now() if note.first_s is None else note.first_s
                        if event.finish is not None:
                            reasons.append(event.finish)
                    elif isinstance(event, Ended):
                        usage, outcome = event.usage, "+".join(sorted(set(reasons)))
                    yield event
        except Refused as error:
            outcome = f"refused-{error.status}"
            note.refused = str(error)
            raise
        except Exception as error:
            outcome = type(error).__name__
            note.refused = f"{outcome}: {error}" if isinstance(error, HeadraceError) else outcome
            raise
        finally:
            note.end_s = clock.now()
            LOG.info("%s", " ".join(_about(note, book, usage, outcome)))

    return call_and_log


def _about(note: Note, book: Book, usage: Usage, outcome: str) -> Iterator[str]:
    now = clock.now()
    spent = book.times(note, now)
    yield note.id
    if note.request_id:
        yield f"request={note.request_id}"
    if note.tenant:
        yield f"tenant={note.tenant}"
    yield f"prompt={usage.prompt_tokens} cached={usage.cached_tokens} output={usage.output_tokens}"
    if spent is not None:
        yield f"queue={_ms(spent.queue_s)} prefill={_ms(spent.prefill_s)} decode={_ms(spent.decode_s)}"
        yield f"preempted={spent.preemptions}"
        if waited := words.short(spent):
            yield f"waited-for={waited.replace(' ', '-')}"
    yield "ttft=-" if note.first_s is None else f"ttft={note.first_s - note.began_s:.3f}s"
    yield f"total={now - note.began_s:.3f}s finish={outcome}"


def visited(book: Book, scope: Scope, began_s: float, status: int | None) -> None:
    """An HTTP request is over: a line, if it was no call, or was refused before it became one. The query is left out,
    because some clients put keys there. What is asked every few seconds is worth a line only if it fails."""
    note = note_of(book, scope, began_s)
    if note is not None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        book.visited(note, Visit(scope["path"], status, headers))
        return
    path, failed = scope["path"], status is None or status >= 400
    quiet = not failed and scope["method"] in ("GET", "HEAD") and path.startswith(_QUIET)
    plain = ascii(path[:200])[1:-1]
    outcome = "gone" if status is None else f"refused-{status}" if failed else "done"
    why = scope["state"].get("refused")
    tail = f" finish={outcome}{f' code={why}' if why else ''}"
    name, total_s = scope["state"]["client_id"], clock.now() - began_s
    LOG.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %s status=%s total=%.3fs%s",
        name,
        scope["method"],
        plain,
        status or "-",
        total_s,
        tail,
    )


def server_timing(book: Book, scope: Scope, began_s: float) -> bytes:
    """The header's value: what is known when the headers are sent, in milliseconds. Of a stream that is the time until
    the first token; the explanation of the request has the rest."""
    now = clock.now()
    note = note_of(book, scope, began_s)
    spent = None if note is None else book.times(note, now)
    parts = [] if note is None or spent is None else list(_timed(note, spent))
    return ", ".join([*parts, f"total;dur={1e3 * (now - began_s):.1f}"]).encode()


def _timed(note: Note, spent: Times) -> Iterator[str]:
    yield f"queue;dur={1e3 * spent.queue_s:.1f}"
    yield f"prefill;dur={1e3 * spent.prefill_s:.1f}"
    if note.end_s is not None:
        yield f"decode;dur={1e3 * spent.decode_s:.1f}"
    if note.first_s is not None:
        yield f"ttft;dur={1e3 * (note.first_s - note.began_s):.1f}"


def note_of(book: Book, scope: Scope, began_s: float) -> Note | None:
    """Of the call that an HTTP request became, if it became one."""
    caller = scope["state"].get("caller")
    note = book.latest("" if caller is None else caller.tenant, scope["state"]["client_id"])
    return note if note is not None and note.began_s >= began_s else None


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}ms"
