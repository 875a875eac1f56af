"""What the server tells about its requests: `GET /v1/requests`, `/v1/requests/{id}/explain` and `/v1/steps`.

Joins what the gateway knows of a call (its ids, when it came, how it was refused) with what `core.explain` knows of its
requests. Owns the notes of the calls, bounded by the same number as the explanations. A caller sees its own tenant's
requests; an admin, or anybody where there are no keys, sees all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from headrace.core import clock
from headrace.core.explain import told, words
from headrace.core.explain.chronicle import Beat
from headrace.core.explain.fold import Explanations
from headrace.core.explain.record import Record
from headrace.core.explain.told import Explanation, Other, Phase, Times, Viewer
from headrace.core.types import RequestId
from headrace.gateway import shapes
from headrace.gateway.errors import Refused, bad
from headrace.gateway.keys import caller_of
from headrace.gateway.models import Model, Models
from headrace.gateway.openapi import Answer, Operation

_MOST_ROWS = 500
_ROWS = 100


@dataclass(slots=True)
class Note:
    """One call, as the gateway saw it."""

    id: str
    request_id: str  # the x-request-id of the response
    tenant: str
    model: str
    choices: tuple[RequestId, ...]
    began_s: float
    model_ready: bool = True  # whether its model was in memory when it came
    first_s: float | None = None  # when its first token was there
    end_s: float | None = None
    refused: str | None = None  # why it ended before it was queued, or without an answer


@dataclass(frozen=True, slots=True)
class Visit:
    """The HTTP request that a call came with, when it is over."""

    path: str
    status: int | None  # None: its answer never began
    headers: Mapping[str, str]


class Tracing(Protocol):
    """Tells somebody else of calls; see `traces`."""

    def tell(self, note: Note, visit: Visit, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Book:
    """All that is remembered."""

    explanations: Explanations = field(default_factory=Explanations)
    keep: int = 1000
    tracing: Tracing | None = None
    _notes: OrderedDict[str, Note] = field(default_factory=OrderedDict)  # by the call's id, the oldest first
    _names: dict[tuple[str, str], str] = field(default_factory=dict)  # (tenant, x-request-id or choice) -> call's id

    def begin(self, note: Note) -> None:
        """A call has come. The oldest one is forgotten, but never one that still lives."""
        self._notes[note.id] = note
        for name in (note.request_id, *note.choices):
            self._names[note.tenant, name] = note.id
        if len(self._notes) > self.keep:
            oldest = next(iter(self._notes.values()))
            if oldest.end_s is None:
                self._notes.move_to_end(oldest.id)
            else:
                self._forget(oldest)

    def find(self, name: str, viewer: Viewer) -> Note | None:
        """By the id in the body, by the response's x-request-id, or by the id of a choice."""
        note = self._notes.get(self._names.get((viewer.tenant, name), name))
        if note is None and viewer.admin:
            note = next((one for one in reversed(self._notes.values()) if name in (one.request_id, *one.choices)), None)
        return note if note is not None and viewer.may_see(note.tenant) else None

    def latest(self, tenant: str, request_id: str) -> Note | None:
        """The last call under this x-request-id."""
        call_id = self._names.get((tenant, request_id))
        return None if call_id is None else self._notes[call_id]

    def notes(self, viewer: Viewer) -> Iterator[Note]:
        """Live ones, the first first, and then finished ones, the last first."""
        mine = [note for note in self._notes.values() if viewer.may_see(note.tenant)]
        yield from (note for note in mine if note.end_s is None)
        yield from (note for note in reversed(mine) if note.end_s is not None)

    def records(self, note: Note) -> list[Record]:
        found = map(self.explanations.find, note.choices)
        return [record for record in found if record is not None]

    def times(self, note: Note, now: float) -> Times | None:
        """Of the choice that took longest."""
        spent = [told.times(self.explanations, record, now) for record in self.records(note)]
        return max(spent, key=lambda one: one.queue_s + one.prefill_s + one.decode_s, default=None)

    def visited(self, note: Note, visit: Visit) -> None:
        """Its answer has been sent, or its client is gone."""
        if self.tracing is not None:
            self.tracing.tell(note, visit, self.records(note))

    def close(self) -> None:
        if self.tracing is not None:
            self.tracing.close()

    def check(self) -> None:
        live = sum(note.end_s is None for note in self._notes.values())
        assert len(self._notes) <= self.keep + live
        assert set(self._names.values()) <= self._notes.keys(), "a name leads nowhere"

    def _forget(self, note: Note) -> None:
        del self._notes[note.id]
        for name in (note.request_id, *note.choices):
            if self._names.get((note.tenant, name)) == note.id:
                del self._names[note.tenant, name]


def served(book: Book, models: Models) -> list[tuple[Operation, Any]]:
    """The three operations, and who answers them."""
    pages = Pages(book, models)
    explained = {200: Answer(shapes.Explained, says="the explanation, or its words alone with ?format=text")}
    one = {"id": "the id in the body, the x-request-id of the response, or the id of a choice"}
    why = Operation(
        "/v1/requests/{id}/explain", "GET", "Where its time went, and why", explained, shapes.Error, parameters=one
    )
    rows = Operation("/v1/requests", "GET", "Live and recent requests", {200: Answer(shapes.RequestRows)}, shapes.Error)
    steps = Operation("/v1/steps", "GET", "The last steps", {200: Answer(shapes.StepRows)}, shapes.Error)
    return [(why, pages.explain), (rows, pages.requests), (steps, pages.steps)]


# -- pages -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pages:
    """Who answers the three paths."""

    book: Book
    models: Models

    async def explain(self, request: Request) -> Response:
        viewer, name = viewer_of(request), request.path_params["id"]
        note = self.book.find(name, viewer)
        if note is None:
            message = (
                f"No request {name[:128]!r} is known; the last {self.book.keep:,} are, by the id in the body or by the "
                "x-request-id of the response."
            )
            raise Refused(404, message, code="request_not_found", param="id")
        kind = request.query_params.get("format", "json")
        if kind not in ("json", "text"):
            raise bad("format: json or text.", "format")
        explained = _explained(self.book, note, viewer, clock.now())
        return PlainTextResponse(_text(explained)) if kind == "text" else _json(explained)

    async def requests(self, request: Request) -> Response:
        viewer, most = viewer_of(request), _limit(request, _ROWS, _MOST_ROWS)
        state = request.query_params.get("state", "")
        if state not in ("", "live", "finished"):
            raise bad("state: live or finished.", "state")
        notes = self.book.notes(viewer)
        chosen = (note for note in notes if not state or (note.end_s is None) == (state == "live"))
        now = clock.now()
        rows = [_row(self.book, note, now) for note in islice(chosen, most + 1)]
        return _json(shapes.RequestRows(data=rows[:most], has_more=len(rows) > most))

    async def steps(self, request: Request) -> Response:
        most = _limit(request, 300, 300)
        since_s = clock.wall() - clock.now()
        beats = self.book.explanations.steps()[-most:]
        memory = [_memory(model) for model in self.models]
        rows = [_beat(beat, since_s) for beat in beats]
        return _json(shapes.StepRows(now=round(clock.wall(), 4), memory=memory, data=rows))


def viewer_of(request: Request) -> Viewer:
    """Who asks. Where nobody is asked for a key, everybody may see everything."""
    caller = caller_of(request.scope)
    return Viewer(caller.tenant, caller.admin)


def _limit(request: Request, usual: int, most: int) -> int:
    given = request.query_params.get("limit", str(usual))
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= most:
        raise bad(f"limit: 1 to {most}.", "limit")
    return int(given)


def _row(book: Book, note: Note, now: float) -> shapes.RequestRow:
    records = book.records(note)
    spent, first = book.times(note, now), records[0] if records else None
    drawn = [one.first_token_s - note.began_s for one in records if one.first_token_s is not None]
    finish = "+".join(sorted({one.finish.value for one in records if one.finish is not None}))
    return shapes.RequestRow(
        id=note.id,
        request_id=note.request_id,
        model=note.model,
        tenant=note.tenant or None,
        state=_state(records, note),
        created=clock.wall() - (now - note.began_s),
        choices=len(note.choices),
        prompt_tokens=first.prompt_tokens if first else 0,
        cached_tokens=first.cached_tokens if first else 0,
        output_tokens=sum(told.output_tokens(book.explanations, one, now) for one in records),
        queue_ms=_ms(spent.queue_s if spent else 0.0),
        prefill_ms=_ms(spent.prefill_s if spent else 0.0),
        decode_ms=_ms(spent.decode_s if spent else 0.0),
        ttft_ms=_ms(min(drawn)) if drawn else None,
        total_ms=_ms((now if note.end_s is None else note.end_s) - note.began_s),
        preemptions=sum(one.preemptions for one in records),
        finish=None if note.end_s is None else note.refused or finish or None,
        waits_for=words.short(spent) if spent else "" if note.model_ready or note.end_s else words.LOADING,
    )


def _state(records: Sequence[Record], note: Note) -> shapes.RequestState:
    """Of several choices, that of the one that has come furthest and is not finished."""
    states = {told.state(record) for record in records}
    for state in ("decoding", "prefilling", "waiting"):
        if state in states:
            return state
    return "waiting" if note.end_s is None and not records else "finished"


def _explained(book: Book, note: Note, viewer: Viewer, now: float) -> shapes.Explained:
    records = book.records(note)
    choices = [told.explain(book.explanations, record, viewer, now) for record in records]
    end_s = now if note.end_s is None else note.end_s
    before_s = (records[0].arrival_s if records else end_s) - note.began_s
    said = [] if note.model_ready else words.loaded(before_s, waits=not records and note.end_s is None)
    if choices:
        said += words.tell(choices[0])
    elif note.refused is not None:
        said.append(f"It was refused before it was queued: {note.refused.rstrip('.')}.")
    elif not said:
        said.append("It has not been queued yet." if note.end_s is None else "It ended before it was queued.")
    return shapes.Explained(
        id=note.id,
        request_id=note.request_id,
        model=note.model,
        tenant=note.tenant or None,
        created=clock.wall() - (now - note.began_s),
        state=_state(records, note),
        words=said,
        before_ms=_ms(before_s),
        total_ms=_ms(end_s - note.began_s),
        refused=note.refused,
        choices=[_choice(one) for one in choices],
    )


def _text(explained: shapes.Explained) -> str:
    lines = [f"{explained.id}  x-request-id {explained.request_id}  {explained.model}".rstrip()]
    said = [explained.words, *(choice.words for choice in explained.choices[1:])]
    for at, sentences in enumerate(said):
        lines += [f"choice {explained.choices[at].id}"] if len(said) > 1 else []
        lines += [f"  {sentence}" for sentence in sentences]
    return "\n".join(lines) + "\n"


def _choice(one: Explanation) -> shapes.ExplainedChoice:
    return shapes.ExplainedChoice(
        id=one.id,
        state=one.state,  # type: ignore[arg-type]
        words=words.tell(one),
        prompt_tokens=one.prompt_tokens,
        cached_tokens=one.cached_tokens,
        cache_miss=one.missed,
        output_tokens=one.output_tokens,
        queue_ms=_ms(one.queue_s),
        prefill_ms=_ms(one.prefill_s),
        decode_ms=_ms(one.decode_s),
        total_ms=_ms(one.total_s),
        ttft_ms=None if one.ttft_s is None else _ms(one.ttft_s),
        requests_ahead=one.ahead,
        preemptions=one.preemptions,
        drafted_tokens=one.drafted_tokens,
        accepted_tokens=one.accepted_tokens,
        finish=one.finish,
        phases=[_phase(phase) for phase in one.phases],
        chunks=[
            shapes.ExplainedChunk(chunk.step, chunk.steps, _ms(chunk.begin_s), _ms(chunk.seconds), chunk.tokens)
            for chunk in one.chunks
        ],
        preempted=[
            shapes.ExplainedPreemption(
                _ms(lost.at_s), lost.reason, None if lost.to is None else _who(lost.to), lost.lost_tokens
            )
            for lost in one.yields
        ],
    )


def _phase(phase: Phase) -> shapes.ExplainedPhase:
    return shapes.ExplainedPhase(
        kind=phase.kind,  # type: ignore[arg-type]
        begin_ms=_ms(phase.begin_s),
        ms=_ms(phase.seconds),
        steps=phase.steps,
        steps_with_prompts=phase.steps_with_prompts,
        prompts_ms=_ms(phase.prompts_s),
        other_tenants_prompts_ms=_ms(phase.others_prompts_s),
        slowed_ms=_ms(phase.slowed_s),
        other_tenants_slowed_ms=_ms(phase.others_slowed_s),
        places_ms=_ms(phase.places_s),
        memory_ms=_ms(phase.memory_s),
        policy_ms=_ms(phase.policy_s),
        causes=[shapes.Blame(_who(cause.other), _ms(cause.seconds)) for cause in phase.causes],
    )


def _who(other: Other) -> shapes.Who:
    return shapes.Who(other.whose, other.request_id, other.tenant, other.prompt_tokens)  # type: ignore[arg-type]


def _beat(beat: Beat, since_s: float) -> shapes.StepRow:
    return shapes.StepRow(
        model=beat.model,
        step=beat.step,
        repetitions=beat.steps,
        ended=round(beat.end_s + since_s, 4),
        ms=_ms(beat.seconds),
        requests=beat.requests,
        tokens=beat.tokens,
        running=beat.running,
        waiting=beat.waiting,
        prompts=beat.prompts,
        used_blocks=beat.used_blocks,
        total_blocks=beat.total_blocks,
        held=beat.held,  # type: ignore[arg-type]
    )


def _memory(model: Model) -> shapes.KvMemory:
    now = model.service.status()
    capacity = now.capacity
    return shapes.KvMemory(model.name, capacity.block_tokens, capacity.blocks, now.used_blocks, now.cached_blocks)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
