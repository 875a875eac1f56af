"""Accounts in Redis, so that several gateways share the limits of a key. Decides nothing: it reads an account, lets
`limits.Account` decide, and writes it back if nobody else has meanwhile, or begins again. Imported only with
`--limits-redis`; needs `pip install headrace[redis]`.

    gateway 1 -- GET, TIME --> account --> take --> SET if unchanged --> ticket
    gateway 2 -- GET, TIME --> account --> take --> SET if unchanged: no --> GET, TIME ...

The time is Redis's own. What a gateway holds when it dies comes back after a lease, as used in full. While Redis does
not answer, calls of keys with limits are refused (`closed`), or counted by each gateway for itself (`open`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace.core import clock
from headrace.core.types import HeadraceError
from headrace.gateway.errors import LOG
from headrace.gateway.limits import Account, Denied, InProcess, Limits, Standing, Ticket

T = TypeVar("T")
LEASE_S = 900.0  # a gateway that has said nothing about a key for so long holds nothing of it any more
_PATIENCE_S = 1.0  # for one answer of Redis
_TROUBLE_S = 1.0  # after a failure, Redis is not asked for so long
_FORGET_S = 7 * 86_400  # accounts that nobody used; those with a budget stay
_UNLESS_CHANGED = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if ARGV[3] == '0' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3]) end
return 1
"""


@dataclass(slots=True)
class Entry:
    """What Redis keeps of one key."""

    account: Account = field(default_factory=Account)
    heard_s: dict[str, float] = field(default_factory=dict)  # gateway that holds tickets -> when it last said something

    def heard(self, gateway: str, now: float) -> None:
        """Gateways that have been silent for a lease lose their tickets, which count as used in full."""
        self.heard_s[gateway] = now
        silent = {name for name, at_s in self.heard_s.items() if at_s < now - LEASE_S}
        for name in silent:
            del self.heard_s[name]
        for ticket, tokens in list(self.account.running.items()):
            if ticket.partition(":")[0] in silent:
                self.account.settle(Ticket(ticket, "", Limits(), tokens, now), tokens, True, now)


class LostRedis(HeadraceError):
    """Redis does not answer, or not with what was written."""


class Shared:
    """A `Store` for many gateways. Owns the connection and the calls to it that are not over."""

    def __init__(
        self,
        url: str,
        apart: InProcess | None,
        spent: Mapping[str, int],
        charged: Callable[[str, int], None] = lambda key, used: None,
    ) -> None:
        """`apart` counts while Redis does not answer; None refuses meanwhile. `spent` begins accounts that are not in
        Redis. Raises ValueError for a URL that is none."""
        options: dict[str, Any] = {"socket_timeout": _PATIENCE_S, "socket_connect_timeout": _PATIENCE_S}
        self._redis: Redis = Redis.from_url(url, **options)
        self._unless_changed = self._redis.register_script(_UNLESS_CHANGED)
        self._apart = apart
        self._spent = spent
        self._charged = charged
        self._name = secrets.token_hex(6)
        self._taken = 0
        self._locks: dict[str, asyncio.Lock] = {}  # one change of an account at a time; no more than keys
        self._busy = set[asyncio.Task[Any]]()
        self._lost_s: float | None = None  # when it last failed

    async def take(self, key_id: str, limits: Limits, tokens: int) -> Ticket:
        """See `limits.Store`."""
        try:
            taking = self._go(self._take(key_id, limits, tokens))
            return await asyncio.shield(taking)
        except LostRedis:
            if self._apart is None:
                raise Denied("store", _TROUBLE_S, Standing()) from None
            return await self._apart.take(key_id, limits, tokens)
        except asyncio.CancelledError:
            taking.add_done_callback(self._undo)
            raise

    async def settle(self, ticket: Ticket, used_tokens: int, counts: bool = True) -> None:
        """See `limits.Store`. What Redis does not learn now it counts as used when the lease ends."""
        if not ticket.id.startswith(self._name):
            assert self._apart is not None
            await self._apart.settle(ticket, used_tokens, counts)
            return
        try:
            await asyncio.shield(self._go(self._settle(ticket, used_tokens, counts)))
        except LostRedis:
            LOG.warning("%d tokens of key %s count as %d: Redis is lost", used_tokens, ticket.key_id, ticket.tokens)

    async def close(self) -> None:
        """What is under way is finished first."""
        while self._busy:
            await asyncio.gather(*self._busy, return_exceptions=True)
        await self._redis.aclose()

    async def _take(self, key_id: str, limits: Limits, tokens: int) -> Ticket:
        self._taken += 1
        name = f"{self._name}:{self._taken}"

        def take(account: Account, now: float) -> Ticket:
            return account.take(Ticket(name, key_id, limits, tokens, now), now)

        return await self._change(key_id, limits, take)

    async def _settle(self, ticket: Ticket, used_tokens: int, counts: bool) -> None:
        def settle(account: Account, now: float) -> int:
            return account.settle(ticket, used_tokens, counts, now)

        charged = await self._change(ticket.key_id, ticket.limits, settle)
        if charged:
            self._charged(ticket.key_id, charged)

    async def _change(self, key_id: str, limits: Limits, change: Callable[[Account, float], T]) -> T:
        """What `change` says of the account, once that is written. Raises what it raises, and LostRedis."""
        if self._lost_s is not None and clock.now() < self._lost_s + _TROUBLE_S:
            raise LostRedis("Redis did not answer a moment ago")
        try:
            async with self._locks.setdefault(key_id, asyncio.Lock()):
                found = await self._changed(key_id, limits, change)
        except (RedisError, OSError, TimeoutError, msgspec.DecodeError) as error:
            if self._lost_s is None:  # its message may hold the URL, and that a password
                what = "refused" if self._apart is None else "counted by this gateway alone"
                LOG.error("Redis is lost (%s): calls of keys with limits are %s", type(error).__name__, what)
            self._lost_s = clock.now()
            raise LostRedis("Redis does not answer") from error
        if self._lost_s is not None:
            self._lost_s = None
            LOG.warning("Redis is back: limits are shared again")
        return found

    async def _changed(self, key_id: str, limits: Limits, change: Callable[[Account, float], T]) -> T:
        name = f"headrace:limits:{key_id}"
        lasting_s = _FORGET_S if limits.budget_tokens is None else 0
        while True:
            asked = self._redis.pipeline(transaction=False)
            asked.get(name)
            asked.time()
            raw, (seconds, micros) = await asked.execute()
            entry = Entry(Account(self._spent.get(key_id, 0)))
            if raw is not None:
                entry = msgspec.msgpack.decode(raw, type=Entry)
            now = seconds + 1e-6 * micros
            entry.heard(self._name, now)
            found = change(entry.account, now)
            after = msgspec.msgpack.encode(entry)
            if await self._unless_changed(keys=[name], args=[raw or b"", after, lasting_s]):
                return found

    def _go(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to its end whoever goes away meanwhile."""
        task = asyncio.ensure_future(work)
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)
        return task

    def _undo(self, taking: asyncio.Task[Ticket]) -> None:
        """Nobody is there any more for what was taken."""
        if not taking.cancelled() and taking.exception() is None:
            self._go(self._settle(taking.result(), 0, False)).add_done_callback(_read)


def _read(task: asyncio.Task[Any]) -> None:
    """asyncio complains of failures that nobody has looked at."""
    if not task.cancelled():
        task.exception()
