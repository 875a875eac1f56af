"""The published document describes exactly what is served, in schemas that hold."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from gateway_rig import RoteService, ask, chat, events_of, make_text

from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.gateway import endpoints, shapes
from headrace.gateway.app import build
from headrace.gateway.bounds import SchemaDepth, check_free
from headrace.gateway.errors import Refused

APP = build(RoteService(), make_text(), GatewaySettings(), Metrics())


def described() -> dict[str, Any]:
    _, _, body = clock.run(ask(APP, "/openapi.json", method="GET"))
    document: dict[str, Any] = json.loads(body)
    return document


def test_every_route_and_method_is_described_and_nothing_else() -> None:
    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in APP.routes
        for method in (route.methods or ()) - {"HEAD"}
    }
    assert served == {(path, method) for path, methods in described()["paths"].items() for method in methods}


def test_every_reference_leads_somewhere_and_every_body_is_closed() -> None:
    document = described()
    text = json.dumps(document)
    for name in set(text.split('"#/components/schemas/')[1:]):
        assert name.split('"')[0] in document["components"]["schemas"]
    for dialect in endpoints.DIALECTS:
        body = dialect.operation.body
        assert body is not None
        described_body = document["paths"][dialect.operation.path]["post"]["requestBody"]["content"]["application/json"]
        schema = document["components"]["schemas"][described_body["schema"]["$ref"].rsplit("/", 1)[-1]]
        assert schema["additionalProperties"] is False
        assert set(schema["properties"]) == body.served | body.ignored | set(body.refused)


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 2, "n": 2}])
def test_answers_and_events_are_of_the_published_types(fields: dict[str, Any]) -> None:
    _, _, body = clock.run(ask(APP, "/v1/chat/completions", chat(**fields)))
    assert msgspec.json.decode(body, type=shapes.ChatCompletion, strict=True).choices
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, _, stream = clock.run(ask(APP, "/v1/chat/completions", chat(**fields, **options)))
    assert [msgspec.convert(event, shapes.ChatChunk, strict=True) for event in events_of(stream)]


def test_free_values_are_bounded_in_depth() -> None:
    deep: Any = "x"
    for _ in range(SchemaDepth):
        deep = {"a": deep}
    check_free(deep, "tools")
    with pytest.raises(Refused, match="nested deeper"):
        check_free([deep], "tools")
