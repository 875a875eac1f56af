"""/v1/files, /v1/batches and stored /v1/responses over HTTP: paths and forms to functions over the database.

Decides shapes and bounds of what is asked. Owns nothing; without a database every page says how to get one.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from headrace.core import clock
from headrace.gateway import multipart, shapes
from headrace.gateway.bounds import Body, Name
from headrace.gateway.edge import read_body
from headrace.gateway.errors import Refused, bad
from headrace.gateway.keys import caller_of
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.state import batches, files
from headrace.gateway.state.batches import Batch
from headrace.gateway.state.database import Database
from headrace.gateway.state.files import Page
from headrace.gateway.state.responses import Responses
from headrace.gateway.state.shapes import (
    BatchList,
    BatchShown,
    Deleted,
    FileList,
    FileShown,
    ItemList,
    batch_shown,
    file_shown,
)

T = TypeVar("T")
Served = tuple[Operation, Callable[[Request], Awaitable[Response]]]
_HOUR_S, _MONTH_S = 3600, 30 * 86_400


class Expiry(Struct, forbid_unknown_fields=True):
    seconds: Annotated[int, Meta(ge=_HOUR_S, le=_MONTH_S)]
    anchor: Literal["created_at"] = "created_at"


class BatchRequest(Struct, kw_only=True):
    input_file_id: Name
    endpoint: Name
    completion_window: Literal["24h"] = "24h"
    metadata: (
        Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
        | None
    ) = None
    output_expires_after: Expiry | None = None


BATCH = Body(BatchRequest, frozenset(), {})


class Upload(
    Struct, kw_only=True, forbid_unknown_fields=True,
    rename={"anchor": "expires_after[anchor]", "seconds": "expires_after[seconds]"},
):  # fmt: skip
    """The fields of an upload's form, for the published document; `Pages.upload` enforces them."""

    file: Annotated[str, Meta(description="with a file name", extra_json_schema={"format": "binary"})]
    purpose: Literal[files.PURPOSES]  # type: ignore[valid-type]
    anchor: Literal["created_at"] = "created_at"
    seconds: Annotated[int, Meta(ge=_HOUR_S, le=_MONTH_S)] | None = None


class Asked(Struct, kw_only=True):
    """What may follow the question mark of a list, for the published document; `_page` enforces it."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    after: Annotated[str, Meta(max_length=256)] = ""
    order: Literal["asc", "desc"] = "desc"


class AskedOfFiles(Struct, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    after: Annotated[str, Meta(max_length=256)] = ""
    order: Literal["asc", "desc"] = "desc"
    purpose: str = ""


class Pages:
    """Handlers of requests. `wake` tells whoever runs batches that there is something new."""

    def __init__(self, database: Database | None, max_file: int, max_stored: int, max_body: int) -> None:
        self._database_or_none = database
        self._max_file = max_file
        self._max_stored = max_stored
        self._max_body = max_body
        self.wake: Callable[[], None] = lambda: None

    @property
    def _database(self) -> Database:
        if self._database_or_none is None:
            message = "This server keeps nothing: its state directory is in use by another; give it one: --state-dir."
            raise Refused(503, message, code="no_state")
        return self._database_or_none

    # -- files ---------------------------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        database = self._database
        content_type = request.headers.get("content-type", "").encode("latin-1")
        between = multipart.boundary(content_type)
        limit = self._max_file + (64 << 10)  # the file, and the form around it
        body = await read_body(request.scope, request.receive, limit, multipart.KIND)
        form = multipart.read(body, between)
        keep_s = _keep_s(form)
        part, purpose = form.get("file"), form.get("purpose")
        if unknown := set(form) - {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}:
            raise bad(f"Unknown field {min(unknown)[:64]!r}.", min(unknown)[:64], "unknown_field")
        if part is None or part.filename is None or purpose is None:
            raise bad("The form needs the fields purpose and file.", "file" if part is None else "purpose")
        if len(part.content) > self._max_file:
            raise Refused(413, f"The file is larger than {self._max_file} bytes.", code="file_too_large", param="file")
        name, why, content = part.filename, purpose.text("purpose"), part.content
        now_s, tenant = int(clock.wall()), _tenant(request)
        if why not in files.PURPOSES:
            raise bad(f"purpose: choose one of {', '.join(files.PURPOSES)}.", "purpose")

        def add(connection: sqlite3.Connection) -> files.File:
            files.check_room(connection, len(content), self._max_stored)
            return files.add(connection, tenant, why, name, content, now_s, keep_s)

        return _json(file_shown(await database.write(add)))

    async def list_files(self, request: Request) -> Response:
        page, purpose, now_s = _page(request, 10_000, 10_000), request.query_params.get("purpose"), int(clock.wall())
        found, more = await self._database.read(lambda at: files.listed(at, _tenant(request), purpose, page, now_s))
        data = [file_shown(file) for file in found]
        return _json(FileList(data=data, has_more=more, **_ends(data)))

    async def get_file(self, request: Request) -> Response:
        return _json(file_shown(await self._of_file(request, files.get)))

    async def delete_file(self, request: Request) -> Response:
        file_id, now_s = request.path_params["file_id"], int(clock.wall())
        await self._database.write(lambda at: files.delete(at, _tenant(request), file_id, now_s))
        return _json(Deleted(file_id, "file"))

    async def file_content(self, request: Request) -> Response:
        _, content = await self._of_file(request, files.content)
        headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def _of_file(self, request: Request, find: Callable[[sqlite3.Connection, str, str, int], T]) -> T:
        file_id, now_s = request.path_params["file_id"], int(clock.wall())
        return await self._database.read(lambda connection: find(connection, _tenant(request), file_id, now_s))

    # -- batches -------------------------------------------------------------------------------------------------------

    async def create_batch(self, request: Request) -> Response:
        database = self._database
        asked = BATCH.decode(await read_body(request.scope, request.receive, self._max_body))
        metadata = json.dumps(asked.metadata) if asked.metadata else None
        keep_s = asked.output_expires_after.seconds if asked.output_expires_after else None
        now_s = int(clock.wall())
        what = (_sender(request), asked.endpoint, asked.input_file_id, metadata, keep_s, now_s)
        batch = await database.write(lambda connection: batches.create(connection, *what))
        self.wake()
        return _json(batch_shown(batch, (0, 0)))

    async def list_batches(self, request: Request) -> Response:
        page = _page(request, 20, 100)

        def read(connection: sqlite3.Connection) -> tuple[list[BatchShown], bool]:
            found, more = batches.listed(connection, _tenant(request), page)
            return [batch_shown(batch, batches.counts(connection, batch)) for batch in found], more

        data, more = await self._database.read(read)
        return _json(BatchList(data=data, has_more=more, **_ends(data)))

    async def get_batch(self, request: Request) -> Response:
        batch_id = request.path_params["batch_id"]
        return _json(await self._database.read(lambda at: _shown(at, batches.get(at, _tenant(request), batch_id))))

    async def cancel_batch(self, request: Request) -> Response:
        batch_id, now_s = request.path_params["batch_id"], int(clock.wall())
        shown = await self._database.write(lambda at: _shown(at, batches.cancel(at, _tenant(request), batch_id, now_s)))
        self.wake()
        return _json(shown)

    # -- responses -----------------------------------------------------------------------------------------------------

    async def get_response(self, request: Request) -> Response:
        if request.query_params.get("stream") == "true":
            raise bad("stream: an answer that is complete is not streamed again.", "stream")
        body, _ = await self._stored(request)
        return Response(body, media_type="application/json")

    async def response_input(self, request: Request) -> Response:
        _, messages = await self._stored(request)
        data = [item for at, message in enumerate(messages[:-1]) for item in _items(message, at)]
        return _json(ItemList(data=data, first_id=_id(data, 0), last_id=_id(data, -1)))

    async def delete_response(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        if not await Responses(self._database).delete(_tenant(request), response_id):
            raise files.missing("response", response_id)
        return _json(Deleted(response_id, "response"))

    async def _stored(self, request: Request) -> tuple[bytes, tuple[Mapping[str, Any], ...]]:
        response_id = request.path_params["response_id"]
        found = await Responses(self._database).get(_tenant(request), response_id)
        if found is None:
            raise files.missing("response", response_id)
        return found

    # -- what is served ------------------------------------------------------------------------------------------------

    def served(self) -> list[Served]:
        file, batch, response = {"file_id": "its id"}, {"batch_id": "its id"}, {"response_id": "its id"}
        bytes_ = {200: Answer(media="application/octet-stream", says="the bytes that were uploaded, or lines of JSON")}
        return [
            (_operation("POST", "/v1/files", "Keep a file", FileShown, form=Upload), self.upload),
            (_operation("GET", "/v1/files", "The files that are kept", FileList, query=AskedOfFiles), self.list_files),
            (_operation("GET", "/v1/files/{file_id}", "One of them", FileShown, parameters=file), self.get_file),
            (_operation("DELETE", "/v1/files/{file_id}", "Delete it", Deleted, parameters=file), self.delete_file),
            (
                Operation("/v1/files/{file_id}/content", "GET", "Its content", bytes_, shapes.Error, parameters=file),
                self.file_content,
            ),
            (_operation("POST", "/v1/batches", "Answer a file of requests", BatchShown, body=BATCH), self.create_batch),
            (_operation("GET", "/v1/batches", "The batches", BatchList, query=Asked), self.list_batches),
            (_operation("GET", "/v1/batches/{batch_id}", "One of them", BatchShown, parameters=batch), self.get_batch),
            (
                _operation("POST", "/v1/batches/{batch_id}/cancel", "End it early", BatchShown, parameters=batch),
                self.cancel_batch,
            ),
            (
                _operation("GET", "/v1/responses/{response_id}", "A stored response", dict, parameters=response),
                self.get_response,
            ),
            (
                _operation("DELETE", "/v1/responses/{response_id}", "Forget it", Deleted, parameters=response),
                self.delete_response,
            ),
            (
                _operation(
                    "GET", "/v1/responses/{response_id}/input_items", "What it answers", ItemList, parameters=response
                ),
                self.response_input,
            ),
        ]


def _tenant(request: Request) -> str:
    return caller_of(request.scope).tenant


def _sender(request: Request) -> batches.Sender:
    caller = caller_of(request.scope)
    return batches.Sender(caller.tenant, caller.key.id if caller.key else "")


def _operation(method: str, path: str, summary: str, kind: Any, **more: Any) -> Operation:
    return Operation(path, method, summary, {200: Answer(kind)}, shapes.Error, **more)


def _shown(connection: sqlite3.Connection, batch: Batch) -> BatchShown:
    return batch_shown(batch, batches.counts(connection, batch))


def _keep_s(form: Mapping[str, multipart.Part]) -> int | None:
    """How long to keep an uploaded file; None: until it is deleted."""
    part, anchor = form.get("expires_after[seconds]"), form.get("expires_after[anchor]")
    if anchor is not None and anchor.text("expires_after") != "created_at":
        raise bad("expires_after: the anchor is created_at.", "expires_after")
    if part is None:
        return None
    text = part.text("expires_after")
    if not re.fullmatch(r"\d{1,9}", text) or not _HOUR_S <= int(text) <= _MONTH_S:
        raise bad(f"expires_after: seconds lie between {_HOUR_S} and {_MONTH_S}.", "expires_after")
    return int(text)


def _page(request: Request, default: int, most: int) -> Page:
    query = request.query_params
    limit, after, order = query.get("limit", str(default)), query.get("after"), query.get("order", "desc")
    if not re.fullmatch(r"\d{1,6}", limit) or not 1 <= int(limit) <= most:
        raise bad(f"limit: a number from 1 to {most}.", "limit")
    if order not in ("asc", "desc"):
        raise bad("order: asc or desc.", "order")
    return Page(int(limit), after[:256] if after else None, order == "asc")


def _ends(data: list[Any]) -> dict[str, Any]:
    return {"first_id": data[0].id if data else None, "last_id": data[-1].id if data else None}


def _id(data: list[dict[str, Any]], at: int) -> str | None:
    return data[at]["id"] if data else None


def _items(message: Mapping[str, Any], at: int) -> list[dict[str, Any]]:
    """A message of a conversation as the items that a client sends."""
    if message["role"] == "tool":
        output = {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
        return [{"id": f"item_{at}", "status": "completed", **output}]
    items: list[dict[str, Any]] = []
    if message["content"] or "tool_calls" not in message:
        kind = "output_text" if message["role"] == "assistant" else "input_text"
        content = [{"type": kind, "text": message["content"]} | ({"annotations": []} if kind == "output_text" else {})]
        said = {"type": "message", "role": message["role"], "status": "completed", "content": content}
        items.append({"id": f"item_{at}", **said})
    for number, call in enumerate(message.get("tool_calls", ())):
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        called = {"type": "function_call", "call_id": call["id"], "name": call["function"]["name"], "arguments": text}
        items.append({"id": f"item_{at}_{number}", "status": "completed", **called})
    return items


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
