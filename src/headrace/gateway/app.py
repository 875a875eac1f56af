"""The ASGI application: which path leads where. Assembles text, handlers, dialects and the pages that operators read.

Everything that answers about the server itself (health, metrics, models) reads a snapshot and computes nothing, so it
answers in milliseconds however busy the service is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp

from headrace import __version__
from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.ports import Service, Status
from headrace.gateway import openai, shapes
from headrace.gateway.chain import logged
from headrace.gateway.edge import ByMethod, Context, Door, Endpoint, allowed_hosts, http_refusal
from headrace.gateway.errors import LOG, Refused
from headrace.gateway.generation import Generation
from headrace.gateway.openapi import Answer, Operation, document
from headrace.gateway.prometheus import CONTENT_TYPE, Exposition
from headrace.gateway.replies import error_body
from headrace.gateway.text import Text

Page = Callable[[Request], Awaitable[Response]]
Served = tuple[Operation, Page | Endpoint]  # what one method of one path takes and gives, and who answers it


def build(service: Service, text: Text, settings: GatewaySettings, metrics: Metrics) -> Starlette:
    """The server as an application. It closes `text` when it shuts down; the service is its caller's."""
    model = settings.served_name or service.status().model
    handler = logged(Generation(service, text))
    context = Context(model, text, settings.max_choices)
    served: list[Served] = [
        (dialect.operation, Endpoint(dialect, handler, context, settings.max_body)) for dialect in openai.DIALECTS
    ]
    served += _pages(service, model, Exposition(metrics, service, model, settings.metrics_prefix))
    if not text.has_chat:
        LOG.warning("%s; /v1/chat/completions will refuse", text.why_no_chat)
    door = Middleware(Door, hosts=allowed_hosts(settings.host), error_body=error_body)
    app = Starlette(
        routes=_routes(_described(served)),
        middleware=[door],
        exception_handlers={HTTPException: _route_error},
        lifespan=_closing(text),
    )
    app.router.redirect_slashes = False
    return app


def _described(served: Sequence[Served]) -> list[Served]:
    """What is served, and two pages that tell what that is."""
    index = _operation("/", "Name, version and paths", shapes.Index)
    openapi = _operation("/openapi.json", "This document", dict[str, Any])
    operations = [operation for operation, _ in served] + [index, openapi]
    description = _json(document(operations, "Headrace", __version__))
    paths = {operation.path: operation.method for operation in operations}
    names = _json(shapes.Index("headrace", __version__, paths))

    async def show_index(_: Request) -> Response:
        return names

    async def show_description(_: Request) -> Response:
        return description

    return [*served, (index, show_index), (openapi, show_description)]


def _routes(served: Sequence[Served]) -> list[Route]:
    """One route per path, whatever its methods."""
    by_path: dict[str, dict[str, ASGIApp]] = {}
    for operation, endpoint in served:
        app = endpoint if isinstance(endpoint, Endpoint) else request_response(endpoint)
        by_path.setdefault(operation.path, {})[operation.method] = app
    return [Route(path, ByMethod(apps), methods=list(apps)) for path, apps in by_path.items()]


def _operation(path: str, summary: str, kind: Any, *statuses: int, **more: Any) -> Operation:
    """A page: GET, and JSON of one type under each of `statuses`."""
    return Operation(path, "GET", summary, dict.fromkeys(statuses or (200,), Answer(kind)), shapes.Error, **more)


def _pages(service: Service, model: str, exposition: Exposition) -> list[Served]:
    """Pages about the server itself."""
    created = int(clock.wall())

    def card() -> shapes.Model:
        return shapes.Model(id=model, created=created, max_model_len=service.status().capacity.max_context_tokens)

    async def models(_: Request) -> Response:
        return _json(shapes.Models([card()]))

    async def one_model(request: Request) -> Response:
        asked = request.path_params["model"]
        if asked != model:
            message = f"The model {asked[:256]!r} does not exist; this server has {model!r}."
            return _refusal(Refused(404, message, code="model_not_found", param="model"))
        return _json(card())

    async def live(_: Request) -> Response:
        status = service.status()
        return _json(_health(status), 503 if status.state == "failed" else 200)

    async def ready(_: Request) -> Response:
        status = service.status()
        return _json(_health(status), 200 if status.state == "ready" else 503)

    async def scrape(_: Request) -> Response:
        return Response(exposition.text(), headers={"content-type": CONTENT_TYPE.decode()})

    metrics = {200: Answer(media="text/plain", says="metrics in Prometheus' text format")}
    return [
        (_operation("/v1/models", "The models served", shapes.Models), models),
        (
            _operation("/v1/models/{model:path}", "One of them", shapes.Model, parameters={"model": "its name"}),
            one_model,
        ),
        (_operation("/health/live", "Whether the server can go on", shapes.Health, 200, 503), live),
        (_operation("/health/ready", "Whether it takes requests", shapes.Health, 200, 503), ready),
        (Operation("/metrics", "GET", "Counters and histograms", metrics, shapes.Error), scrape),
    ]


def _health(status: Status) -> shapes.Health:
    idle_s = round(max(0.0, clock.now() - status.last_progress_s), 3)
    return shapes.Health(status.state, status.model, status.running, status.waiting, status.steps, idle_s)  # type: ignore[arg-type]


def _closing(text: Text) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        text.close()

    return lifespan


async def _route_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _refusal(http_refusal(error))
    response.headers.update(error.headers or {})
    return response


def _refusal(refusal: Refused) -> Response:
    return Response(error_body(refusal), refusal.status, media_type="application/json")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
