"""Responses that the server remembers, so that a later one can continue them. Owns nothing but a database's rows.

A response keeps its own messages and the id of the one before it; a conversation is the chain of them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from headrace.core import clock
from headrace.gateway.state.database import CannotStore, Database
from headrace.gateway.turns import Messages

MOST_RESPONSES = 10_000  # the oldest are forgotten
KEPT_S = 30 * 86_400
_LONGEST_CHAIN = 1_000
_CHAIN = """
WITH RECURSIVE chain (id, previous, messages, depth) AS (
    SELECT id, previous, messages, 0 FROM responses WHERE id = :id AND tenant = :tenant AND created_s > :since
    UNION ALL
    SELECT r.id, r.previous, r.messages, depth + 1 FROM responses r JOIN chain ON r.id = chain.previous
    WHERE r.tenant = :tenant AND depth < :longest
)
SELECT previous, messages FROM chain ORDER BY depth DESC
"""


@dataclass(frozen=True, slots=True)
class Responses:
    """A `turns.Memory`."""

    database: Database

    async def conversation(self, tenant: str, response_id: str) -> Messages | None:
        since = int(clock.wall()) - KEPT_S
        bound = {"id": response_id, "tenant": tenant, "since": since, "longest": _LONGEST_CHAIN}
        rows = await self.database.read(lambda connection: connection.execute(_CHAIN, bound).fetchall())
        if not rows or rows[0][0] is not None:  # the first one of the chain continues something that is not here
            return None
        messages: list[Mapping[str, Any]] = []
        for _, text in rows:
            messages += json.loads(text)
        return tuple(messages)

    async def keep(self, tenant: str, response_id: str, previous: str | None, messages: Messages, body: bytes) -> None:
        """Where the disk takes nothing the answer is given all the same; who continues it hears that it is not here."""
        now_s = int(clock.wall())
        row = (response_id, tenant, previous, now_s, json.dumps(messages), body)

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)
            connection.execute("DELETE FROM responses WHERE created_s <= ?", (now_s - KEPT_S,))
            connection.execute(
                "DELETE FROM responses WHERE rowid <= (SELECT MAX(rowid) FROM responses) - ?", (MOST_RESPONSES,)
            )

        with suppress(CannotStore):
            await self.database.write(insert)

    async def get(self, tenant: str, response_id: str) -> tuple[bytes, Messages] | None:
        """The response as it was answered, and its own messages, the last of which is the answer."""
        bound = (response_id, tenant, int(clock.wall()) - KEPT_S)
        query = "SELECT body, messages FROM responses WHERE id = ? AND tenant = ? AND created_s > ?"
        row = await self.database.read(lambda connection: connection.execute(query, bound).fetchone())
        return None if row is None else (row[0], tuple(json.loads(row[1])))

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Whether it was there."""
        query = "DELETE FROM responses WHERE id = ? AND tenant = ?"
        return await self.database.write(lambda at: at.execute(query, (response_id, tenant)).rowcount == 1)
