"""Who may call what: the whole policy on one page. A route that is not here is not built.

`public` needs no key, `user` any valid key, `admin` an admin's. Without keys on a server anybody may do all.
A HEAD is a GET. Whatever has no route needs a key too, so that nobody without one learns what there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from headrace.core.types import HeadraceError

Audience = Literal["public", "user", "admin"]

PUBLIC = frozenset(
    {
        "GET /health/live",  # without a key they say one word
        "GET /health/ready",
        "GET /",  # the page for browsers, which asks for a key itself; the index in JSON needs one
        "GET /page/{file}",
    }
)

ADMIN = frozenset({"GET /metrics", "GET /v1/steps"})  # of all tenants together

USER = frozenset(
    {
        "GET /openapi.json",
        "GET /v1/requests",  # of its tenant; of all, to admins
        "GET /v1/requests/{id}/explain",
        "GET /v1/models",
        "GET /v1/models/{model:path}",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/embeddings",
        "POST /v1/responses",
        "GET /v1/responses/{response_id}",
        "DELETE /v1/responses/{response_id}",
        "GET /v1/responses/{response_id}/input_items",
        "POST /v1/messages",
        "POST /v1/messages/count_tokens",
        "POST /v1/files",
        "GET /v1/files",
        "GET /v1/files/{file_id}",
        "DELETE /v1/files/{file_id}",
        "GET /v1/files/{file_id}/content",
        "POST /v1/batches",
        "GET /v1/batches",
        "GET /v1/batches/{batch_id}",
        "POST /v1/batches/{batch_id}/cancel",
        "POST /tokenize",
        "POST /detokenize",
        "POST /api/chat",
        "POST /api/generate",
        "POST /api/embed",
        "POST /api/embeddings",
        "POST /api/show",
        "GET /api/tags",
        "GET /api/ps",
        "GET /api/version",
    }
)


class NoAudience(HeadraceError):
    """A route that nobody has decided about."""


def audience(method: str, path: str) -> Audience:
    """Raises NoAudience."""
    name = f"{method} {path}"
    if name in ADMIN:
        return "admin"
    if name in USER:
        return "user"
    if name in PUBLIC:
        return "public"
    raise NoAudience(f"{name} is served, but gateway/audience.py does not say to whom; write it down there")


def public_paths(served: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Of (method, path) pairs, the paths that need no key to be read. One with a parameter stands for none."""
    return frozenset(path for method, path in served if audience(method, path) == "public" and "{" not in path)
