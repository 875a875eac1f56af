"""Why a prompt was not found in the prefix cache: remembers the names of blocks that prompts brought, and how prompts
of each tenant began. Holds names and hashes, never tokens; bounded by two generations, of which the older is dropped.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from headrace.core.types import BlockKey, Request, RequestId, Tokens

K = TypeVar("K")
V = TypeVar("V")

WHOLE = "whole"  # everything that can be shared was found: the last token is always computed
NOT_ASKED = "not-asked"  # this request reads no cache: it is off, or logprobs of the prompt were asked for
UNNAMED = "unnamed"  # too short to fill a block, or its blocks have no names
FIRST = "first"  # nobody brought this text before
EVICTED = "evicted"  # it was here, and had to make room
UNDER_WAY = "under-way"  # another request brought it and was still being computed
OTHER_SALT = "other-salt"  # the same tenant sent the same beginning with another cache salt, model or adapter
_BEGINNING = 16  # tokens that tell whether two prompts begin alike


class Recent(Generic[K, V]):
    """A map that forgets: of at least `most` entries, the last ones written are there."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def get(self, key: K) -> V | None:
        found = self._young.get(key)
        return self._old.get(key) if found is None else found

    def update(self, more: dict[K, V]) -> None:
        self._young.update(more)
        if len(self._young) > self._most:
            self._young, self._old = {}, self._young

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


class Seen:
    """Of one server: keys of different models differ."""

    def __init__(self, most_keys: int) -> None:
        self._keys: Recent[BlockKey, RequestId] = Recent(most_keys)  # who brought a block last
        self._beginnings: Recent[int, bytes] = Recent(most_keys // 16)  # the salt under which a tenant sent it last

    def came(self, request: Request) -> str | None:
        """A request is admitted for the first time. Returns OTHER_SALT where it may explain a miss of its very first
        block, and remembers how it begins. Only of the same tenant: nobody learns what others send."""
        beginning = _beginning(request)
        if beginning is None:
            return None
        before = self._beginnings.get(beginning)
        self._beginnings.update({beginning: request.salt})
        return OTHER_SALT if before is not None and before != request.salt else None

    def brought(self, request: Request) -> None:
        self._keys.update(dict.fromkeys(request.block_keys, request.id))

    def who(self, key: BlockKey) -> RequestId | None:
        return self._keys.get(key)


def _beginning(request: Request) -> int | None:
    first = request.prompt[0] if request.prompt else None
    if not isinstance(first, Tokens) or len(first) < _BEGINNING:
        return None
    return hash((request.tenant, first.ids[:_BEGINNING]))
