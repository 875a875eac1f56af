"""The built-in page: reads its files when the server starts, and says what a browser may do with them.

The files beside this one are all of it: no build, nothing from another host. The policy lets no text become script,
whatever a model writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from headrace.gateway import shapes
from headrace.gateway.openapi import Answer, Operation

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # ask again, and be told 304: a page never outlives an upgrade
}
OPERATION = Operation(
    "/page/{file}",
    "GET",
    "A part of the built-in page",
    {200: Answer(media="*/*", says="a style, a script or a picture"), 304: Answer(media="*/*", says="as you know it")},
    shapes.Error,
    parameters={"file": "its name"},
)


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    headers: Mapping[str, str]

    def answer(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self.headers["etag"]:
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


class Site:
    """The page in memory."""

    def __init__(self) -> None:
        self._files = {path.name: _read(path) for path in Path(__file__).parent.iterdir() if path.suffix in _TYPES}

    @property
    def paths(self) -> frozenset[str]:
        """Of its parts, which are the same for everybody and open to everybody."""
        return frozenset(OPERATION.path.format(file=name) for name in self._files)

    def index(self, request: Request) -> Response | None:
        """The page for browsers, which say that they read HTML; None for everybody else."""
        if "text/html" not in request.headers.get("accept", ""):
            return None
        return self._files["index.html"].answer(request)

    async def part(self, request: Request) -> Response:
        file = self._files.get(request.path_params["file"])
        if file is None:
            raise HTTPException(404)
        return file.answer(request)


def _read(path: Path) -> _File:
    body = path.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
    return _File(body, {**_HEADERS, "content-type": _TYPES[path.suffix], "etag": etag, "vary": "accept"})
