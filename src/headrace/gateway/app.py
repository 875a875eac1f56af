"""The ASGI application: which path leads where. Assembles text, handlers, dialects and the pages that operators read.

Everything that answers about the server itself (health, metrics, models) reads a snapshot and computes nothing, so it
answers in milliseconds however busy the service is.
"""

from __future__ import annotations

import asyncio
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
from headrace.core.ports import Service
from headrace.gateway import shapes
from headrace.gateway.audience import audience, public_paths
from headrace.gateway.card import Card
from headrace.gateway.checks import Checks
from headrace.gateway.edge import ByMethod, Door, Endpoint, ForAdmins, allowed_hosts, http_refusal
from headrace.gateway.endpoints import Endpoints, Extras, error_body
from headrace.gateway.errors import LOG, Refused
from headrace.gateway.explaining import served as explaining
from headrace.gateway.keys import ASKED, NOBODY, caller_of, no_key
from headrace.gateway.models import Model, Models
from headrace.gateway.openapi import Answer, Operation, document
from headrace.gateway.page import OPERATION as PART
from headrace.gateway.page import Site
from headrace.gateway.prometheus import CONTENT_TYPE, Exposition
from headrace.gateway.replies import error_body as openai_error
from headrace.gateway.state.batches import Bounds
from headrace.gateway.state.runner import Runner
from headrace.gateway.text import Text

Page = Callable[[Request], Awaitable[Response]]
Served = tuple[Operation, Page | Endpoint[Any, Any]]  # what one method of one path takes and gives, and who answers it


def build(
    service: Service, text: Text, settings: GatewaySettings, metrics: Metrics, extras: Extras | None = None,
    checks: Checks | None = None,
) -> Starlette:  # fmt: skip
    """`application` for one model."""
    name = settings.served_name or service.status().model
    return application(Models([Model(name, service, text, Card(name), metrics, checks)]), settings, extras)


def application(models: Models, settings: GatewaySettings, extras: Extras | None = None) -> Starlette:
    """The server as an application. It closes `models` and `extras` when it shuts down; services are its caller's."""
    extras = extras or Extras()
    endpoints = Endpoints(models, settings, extras)
    served: list[Served] = list(endpoints.served())
    served += _pages(models, extras, Exposition(models, settings.metrics_prefix))
    served += explaining(extras.book, models)
    for model in models:
        if not model.text.has_chat:
            LOG.warning("%s: %s; /v1/chat/completions will refuse", model.name, model.text.why_no_chat)
    site = Site()
    served = _described(served, site)
    public = public_paths((operation.method, operation.path) for operation, _ in served) | site.paths
    door = Middleware(
        Door,
        hosts=allowed_hosts(settings.host),
        error_body=error_body,
        book=extras.book,
        guard=extras.guard,
        public=public,
    )
    app = Starlette(
        routes=_routes(served),
        middleware=[door],
        exception_handlers={HTTPException: _route_error},
        lifespan=_living(endpoints, models, settings, extras),
    )
    app.router.redirect_slashes = False
    return app


def _described(served: Sequence[Served], site: Site) -> list[Served]:
    """What is served, and two pages that tell what that is."""
    index = _operation("/", "Name, version and paths; for browsers, the built-in page", shapes.Index)
    openapi = _operation("/openapi.json", "This document", dict[str, Any])
    operations = [operation for operation, _ in served] + [index, openapi, PART]
    description = _json(document(operations, "Headrace", __version__))
    paths = {operation.path: operation.method for operation in operations}
    names = _json(shapes.Index("headrace", __version__, paths))
    names.headers["vary"] = "accept"

    async def show_index(request: Request) -> Response:
        page = site.index(request)
        if page is None and caller_of(request.scope) == NOBODY:
            raise no_key(ASKED)
        return page or names

    async def show_description(_: Request) -> Response:
        return description

    return [*served, (index, show_index), (openapi, show_description), (PART, site.part)]


def _routes(served: Sequence[Served]) -> list[Route]:
    """One route per path, whatever its methods."""
    by_path: dict[str, dict[str, ASGIApp]] = {}
    for operation, endpoint in served:
        app: ASGIApp = endpoint if isinstance(endpoint, Endpoint) else request_response(endpoint)
        if audience(operation.method, operation.path) == "admin":
            app = ForAdmins(app)
        by_path.setdefault(operation.path, {})[operation.method] = app
    return [Route(path, ByMethod(apps), methods=list(apps)) for path, apps in by_path.items()]


def _operation(path: str, summary: str, kind: Any, *statuses: int, **more: Any) -> Operation:
    """A page: GET, and JSON of one type under each of `statuses`."""
    return Operation(path, "GET", summary, dict.fromkeys(statuses or (200,), Answer(kind)), shapes.Error, **more)


def _pages(models: Models, extras: Extras, exposition: Exposition) -> list[Served]:
    """Pages about the server itself."""
    created = int(clock.wall())

    def cards() -> dict[str, shapes.Model]:
        found = {model.name: _shown(model, created) for model in models}
        if extras.embedder is not None:
            name, most = extras.embedder.encoding.model, extras.embedder.encoding.max_tokens
            found[name] = shapes.Model(id=name, created=created, max_model_len=most)
        return found

    async def list_models(request: Request) -> Response:
        caller = caller_of(request.scope)
        return _json(shapes.Models([card for name, card in cards().items() if caller.may_use(name)]))

    async def one_model(request: Request) -> Response:
        asked = request.path_params["model"]
        if asked not in cards() or not caller_of(request.scope).may_use(asked):
            message = f"The model {asked[:256]!r} does not exist; this server has {models.listed()}."
            return _refusal(Refused(404, message, code="model_not_found", param="model"))
        return _json(cards()[asked])

    async def live(request: Request) -> Response:
        health = _health(models)
        return _json(_told(request, health), 503 if health.status in ("failed", "stalled") else 200)

    async def ready(request: Request) -> Response:
        health = _health(models)
        return _json(_told(request, health), 200 if health.status == "ready" else 503)

    async def scrape(_: Request) -> Response:
        return Response(exposition.text(), headers={"content-type": CONTENT_TYPE.decode()})

    metrics = {200: Answer(media="text/plain", says="metrics in Prometheus' text format")}
    return [
        (_operation("/v1/models", "The models served", shapes.Models), list_models),
        (
            _operation("/v1/models/{model:path}", "One of them", shapes.Model, parameters={"model": "its name"}),
            one_model,
        ),
        (_operation("/health/live", "Whether tokens move, or would", shapes.Health, 200, 503), live),
        (_operation("/health/ready", "Whether it takes requests", shapes.Health, 200, 503), ready),
        (Operation("/metrics", "GET", "Counters and histograms", metrics, shapes.Error), scrape),
    ]


def _told(request: Request, health: shapes.Health) -> shapes.Health:
    """Everything to admins, one word to others."""
    return health if caller_of(request.scope).admin else shapes.Health(health.status)


def _shown(model: Model, created: int) -> shapes.Model:
    now = model.residency
    return shapes.Model(
        id=model.name,
        created=created,
        max_model_len=model.max_context_tokens,
        state=now.state,  # type: ignore[arg-type]
        loaded=round(now.share, 3),
        memory_bytes=now.memory_bytes or None,
        error=now.error,
    )


def _health(models: Models) -> shapes.Health:
    """Of the server: of all its models together, and of each of them."""
    each = [_health_of(model) for model in models]
    states = {one.status for one in each}
    state = next(state for state in ("draining", "ready", "restarting", "stalled", "failed") if state in states)
    return shapes.Health(
        state,
        models.first.name,
        sum(one.running for one in each),
        sum(one.waiting for one in each),
        sum(one.steps for one in each),
        min(one.seconds_since_progress for one in each),
        next((one.error for one in each if one.error), None),
        sum(one.restarts for one in each),
        sum(one.violations for one in each),
        models=each,
    )


def _health_of(model: Model) -> shapes.ModelHealth:
    now = model.service.status()
    idle_s = round(max(0.0, clock.now() - now.last_progress_s), 3)
    return shapes.ModelHealth(
        now.state,  # type: ignore[arg-type]
        model.name,
        now.running,
        now.waiting,
        now.steps,
        idle_s,
        now.error,
        now.restarts,
        now.violations,
        model.residency.state,  # type: ignore[arg-type]
    )


def _living(
    endpoints: Endpoints, models: Models, settings: GatewaySettings, extras: Extras
) -> Callable[[Starlette], Any]:
    """What runs beside the requests: batches, until the last connection is closed."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        running: asyncio.Task[None] | None = None
        if extras.database is not None:
            bounds = Bounds(settings.max_body)
            runner = Runner(extras.database, endpoints.ask, openai_error, bounds, settings.batch_requests)
            endpoints.pages.wake = runner.wake
            running = asyncio.create_task(_run_batches(runner))
        try:
            yield
        finally:
            if running is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            models.close()
            extras.close()

    return lifespan


async def _run_batches(runner: Runner) -> None:
    try:
        await runner.run()
    except Exception as error:
        LOG.error("batches have stopped; start the server again to go on with them", exc_info=error)


async def _route_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _refusal(http_refusal(error), request.url.path)
    response.headers.update(error.headers or {})
    return response


def _refusal(refusal: Refused, path: str = "/v1") -> Response:
    return Response(error_body(path, refusal), refusal.status, media_type="application/json")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
