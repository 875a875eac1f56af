"""The published description of the API, made from the types that decode requests and shape answers.

An `Operation` says what one path takes and gives. Every route is made together with one, so the OpenAPI document, the
page in docs/ and what the server does cannot drift apart. Holds no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.gateway.bounds import Body

_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_FORM = "multipart/form-data"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a status answers with: a type and how it is written, or text that no type describes."""

    kind: Any = None  # a msgspec type; None: any text
    media: str = _JSON
    says: str = "the answer"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    path: str  # as starlette writes it: {name} or {name:path}
    method: str
    summary: str
    answers: Mapping[int, Answer]  # by status
    error: Any  # the type of every other answer's JSON
    body: Body[Any] | None = None
    events: Any = None  # the type of one event's data, where the answer may be a stream
    stream_media: str = "text/event-stream"  # how that stream is written
    parameters: Mapping[str, str] = field(default_factory=dict)  # of the path, and what they are
    form: Any = None  # instead of a body: a struct of the fields of a form, in which a file is binary text
    query: Any = None  # a struct of what may follow the question mark

    @property
    def plain_path(self) -> str:
        return self.path.replace(":path}", "}")


def document(operations: Sequence[Operation], title: str, version: str) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    kinds = [kind for operation in operations for kind in _kinds(operation)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    by_kind = dict(zip(map(_key, kinds), schemas, strict=True))
    queries = {_name(by_kind[_key(one.query)]) for one in operations if one.query is not None}
    asked = {name: components.pop(name)["properties"] for name in queries}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        if operation.body is not None:
            _close(components[_name(by_kind[_key(operation.body.kind)])], operation.body)
        described = _operation(operation, by_kind)
        if operation.query is not None:
            described.setdefault("parameters", []).extend(_in_query(asked[_name(by_kind[_key(operation.query)])]))
        paths.setdefault(operation.plain_path, {})[operation.method.lower()] = described
    info = {"title": title, "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}


def _kinds(operation: Operation) -> Iterable[Any]:
    if operation.body is not None:
        yield operation.body.kind
    yield from (kind for kind in (operation.form, operation.query) if kind is not None)
    yield operation.error
    yield from (answer.kind for answer in operation.answers.values() if answer.kind is not None)
    if operation.events is not None:
        yield operation.events


def _key(kind: Any) -> str:
    return repr(kind)


def _operation(operation: Operation, by_kind: Mapping[str, Any]) -> dict[str, Any]:
    answers = {str(status): _answer(answer, by_kind) for status, answer in operation.answers.items()}
    if operation.events is not None:
        # OpenAPI 3.1 has no word for the kind of one event, and some tools take a `schema` of a stream for that.
        answers["200"]["content"][operation.stream_media] = {"x-event": by_kind[_key(operation.events)]}
    wrong = {"description": "what is wrong, in a sentence", "content": _content(operation.error, by_kind)}
    described: dict[str, Any] = {"summary": operation.summary, "responses": {**answers, "default": wrong}}
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(operation.body.kind, by_kind)}
    if operation.form is not None:
        described["requestBody"] = {"required": True, "content": _content(operation.form, by_kind, _FORM)}
    if operation.parameters:
        text = {"type": "string", "minLength": 1}
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": says, "schema": text}
            for name, says in operation.parameters.items()
        ]
    return described


def _answer(answer: Answer, by_kind: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "string"} if answer.kind is None else by_kind[_key(answer.kind)]
    return {"description": answer.says, "content": {answer.media: {"schema": schema}}}


def _content(kind: Any, by_kind: Mapping[str, Any], media: str = _JSON) -> dict[str, Any]:
    return {media: {"schema": by_kind[_key(kind)]}}


def _in_query(fields: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for name, schema in fields.items():
        plain = {key: value for key, value in schema.items() if key != "default"}
        yield {"name": name, "in": "query", "required": False, "schema": plain}


def _name(reference: Mapping[str, Any]) -> str:
    """The component that a reference is to. Types of the same name in different dialects have longer ones."""
    return str(reference["$ref"]).rsplit("/", 1)[-1]


def _close(schema: dict[str, Any], body: Body[Any]) -> None:
    """No other fields than those served, and those that are accepted without effect."""
    without_effect = {name: {"description": "accepted, without effect"} for name in sorted(body.ignored)}
    refused = {
        name: {"enum": [None, *off], "description": "not supported: nothing but these values"}
        for name, off in sorted(body.refused.items())
    }
    schema["properties"] = {**without_effect, **refused, **schema["properties"]}
    schema["additionalProperties"] = False


# -- in words, for docs/api.md -----------------------------------------------------------------------------------------


def table(body: Body[Any]) -> list[str]:
    """A Markdown table of the fields that a body serves, and lines about the others."""
    lines = form_table(body.kind)
    for names, what in (
        (body.ignored, "Accepted without effect"),
        (body.refused, "Refused, unless they ask for nothing"),
    ):
        if names:
            lines += [f"{what}: " + ", ".join(f"`{name}`" for name in sorted(names)) + ".", ""]
    return lines


def form_table(kind: Any) -> list[str]:
    """A Markdown table of the fields of a struct."""
    schema = msgspec.json.schema(kind, ref_template="{name}")
    fields = schema["$defs"][kind.__name__]["properties"]
    rows = [f"| `{name}` | {accepts(fields[name], schema['$defs'])} |" for name in fields]
    return ["| field | accepts |", "|---|---|", *rows, ""]


_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_SIGNS |= {"minLength": "at least", "maxLength": "at most", "minItems": "at least", "maxItems": "at most"}
_SIGNS |= {"maxProperties": "at most", "pattern": "matching"}


def accepts(schema: Mapping[str, Any], defs: Mapping[str, Any], depth: int = 0) -> str:
    """A JSON schema in words, with its bounds and its description."""
    if "$ref" in schema:
        return accepts(defs[schema["$ref"].split("/")[-1]], defs, depth)
    if "anyOf" in schema:
        parts = dict.fromkeys(accepts(part, defs, depth) for part in schema["anyOf"] if part.get("type") != "null")
        return " or ".join(parts)
    limits = [f"{sign} {_shown(schema[key])}" for key, sign in _SIGNS.items() if key in schema]
    note = [schema["description"]] if "description" in schema and "properties" not in schema else []
    return "; ".join([" ".join([_words(schema, defs, depth), ", ".join(limits)]).strip(), *note])


def _words(schema: Mapping[str, Any], defs: Mapping[str, Any], depth: int) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    if schema.get("type") == "array":
        return f"list of {accepts(schema.get('items', {}), defs, depth)}"
    if "properties" in schema:
        fields = schema["properties"]
        if depth:
            return "object with " + ", ".join(f"`{name}`" for name in fields)
        return "object with " + ", ".join(f"`{name}` ({accepts(of, defs, 1)})" for name, of in fields.items())
    return str(schema.get("type", "anything"))


def _shown(value: Any) -> str:
    return f"`{value}`".replace("|", "\\|") if isinstance(value, str) else f"{value:,}"
