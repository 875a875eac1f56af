"""The ASGI application: which path leads where. Assembles text, handlers, dialects and the pages that operators read.

Everything that answers about the server itself (health, metrics, models) reads a snapshot and computes nothing, so it
answers in milliseconds however busy the service is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace import __version__
from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.ports import Service, Status
from headrace.gateway import openai
from headrace.gateway.chain import logged
from headrace.gateway.edge import Context, Door, Endpoint, allowed_hosts, http_refusal
from headrace.gateway.errors import LOG, Refused
from headrace.gateway.generation import Generation
from headrace.gateway.prometheus import CONTENT_TYPE, Exposition
from headrace.gateway.text import Text

Page = Callable[[Request], Awaitable[Response]]


def build(service: Service, text: Text, settings: GatewaySettings, metrics: Metrics) -> Starlette:
    """The server as an application. It closes `text` when it shuts down; the service is its caller's."""
    model = settings.served_name or service.status().model
    handler = logged(Generation(service, text))
    context = Context(model, text, settings.max_choices)
    routes = [
        Route(path, Endpoint(dialect, handler, context, settings.max_body), methods=["POST"])
        for path, dialect in openai.DIALECT.items()
    ]
    routes += _pages(service, model, Exposition(metrics, service, model, settings.metrics_prefix))
    routes.append(Route("/", _index([*routes]), methods=["GET"]))
    if not text.has_chat:
        LOG.warning("%s; /v1/chat/completions will refuse", text.why_no_chat)
    door = Middleware(Door, hosts=allowed_hosts(settings.host), error_body=openai.error_body)
    app = Starlette(
        routes=routes, middleware=[door], exception_handlers={HTTPException: _route_error}, lifespan=_closing(text)
    )
    app.router.redirect_slashes = False
    return app


def _pages(service: Service, model: str, exposition: Exposition) -> list[Route]:
    """Routes about the server itself, all GET."""
    created = int(clock.wall())

    def card() -> dict[str, Any]:
        longest = service.status().capacity.max_context_tokens
        return {
            "id": model,
            "object": "model",
            "created": created,
            "owned_by": "headrace",
            "max_model_len": longest,
        }

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [card()]})

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

    pages: dict[str, Page] = {
        "/v1/models": models,
        "/v1/models/{model:path}": one_model,
        "/health/live": live,
        "/health/ready": ready,
        "/metrics": scrape,
    }
    return [Route(path, page, methods=["GET"]) for path, page in pages.items()]


def _health(status: Status) -> dict[str, Any]:
    return {
        "status": status.state,
        "model": status.model,
        "running": status.running,
        "waiting": status.waiting,
        "steps": status.steps,
        "seconds_since_progress": round(max(0.0, clock.now() - status.last_progress_s), 3),
    }


def _index(routes: list[Route]) -> Page:
    paths = {route.path: sorted((route.methods or set()) - {"HEAD"})[0] for route in routes}

    async def index(_: Request) -> Response:
        return _json({"name": "headrace", "version": __version__, "paths": paths})

    return index


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
    return Response(openai.error_body(refusal), refusal.status, media_type="application/json")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
