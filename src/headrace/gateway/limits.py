"""How much a key may use: pure accounts, `now` an argument. Decides yes or no and how long to stay away; owns the
accounts of one process. `gate` asks it about every call, `shared_limits` keeps the same accounts for many processes.

A call takes one request, and the tokens it may come to, out of buckets that fill evenly and hold one minute's worth;
when it is over, what it did not use goes back. So in any t seconds a key never gets more than limit * (1 + t / 60).

    take(tokens=900) ---- 300 used ----> settle(300): 600 go back       nothing else gives back, and it does so once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from headrace.core.types import HeadraceError

What = Literal["requests", "tokens", "concurrency", "budget", "size", "store"]
_SHORTEST_S, _LONGEST_S = 1.0, 600.0  # what a client may be told to wait
_LATEST = 0.2  # weight of the last call in the mean duration of an account's calls


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers, cached ones too
    concurrency: int | None = None  # calls under way
    budget_tokens: int | None = None  # altogether, for as long as the key lives


@dataclass(frozen=True, slots=True)
class Standing:
    """What is left of the limits per minute, and when they are whole again."""

    requests: float = 0.0
    requests_s: float = 0.0
    tokens: float = 0.0
    tokens_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What one call has taken, to be settled once."""

    id: str
    key_id: str
    limits: Limits
    tokens: int
    at_s: float
    standing: Standing = Standing()


class Denied(HeadraceError):
    """The account does not allow it now; without `retry_after_s`, not later either."""

    def __init__(self, what: What, retry_after_s: float | None, standing: Standing) -> None:
        super().__init__(f"the limit of {what} is reached")
        self.what = what
        self.retry_after_s = None if retry_after_s is None else min(max(retry_after_s, _SHORTEST_S), _LONGEST_S)
        self.standing = standing


class Store(Protocol):
    """Accounts, here or elsewhere."""

    async def take(self, key_id: str, limits: Limits, tokens: int) -> Ticket:
        """Raises Denied. A caller that is cancelled here has taken nothing."""
        ...

    async def settle(self, ticket: Ticket, used_tokens: int, counts: bool = True) -> None:
        """The call is over, also for a caller that is cancelled here. `counts` is False for one that the server
        refused, which is as if it had never come."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class Bucket:
    """Fills evenly up to `per_minute`. May be below zero after a call that used more than it took: then nobody takes
    anything until the debt is paid.

    Tokens that come back are those that would still be here had they never been taken. While a call was under way the
    bucket may have filled up, and what would have run over without the call cannot be given back at its end:

        per_minute ----------.---            level with the call, and (dotted) without it: the dots stop at the
                   . . . .  /                rim, so what comes back is at most the least room there was
                   taken  /                  between the level and the rim meanwhile
    """

    per_minute: int
    level: float
    at_s: float
    room: dict[str, float] = field(default_factory=dict)  # ticket -> the least there was above the level since then

    def fill(self, now: float) -> float:
        self.level = min(self.per_minute, self.level + max(0.0, now - self.at_s) * self.per_minute / 60)
        self.at_s = max(self.at_s, now)
        room = self.per_minute - self.level
        self.room = {ticket: min(least, room) for ticket, least in self.room.items()}
        return self.level

    def take(self, ticket: str, amount: float) -> None:
        self.level -= amount
        self.room[ticket] = math.inf

    def give_back(self, ticket: str, amount: float) -> None:
        """A negative amount was used beyond what was taken."""
        back = min(amount, self.room.pop(ticket, 0.0))
        self.level += back
        self.room = {other: max(0.0, least - back) for other, least in self.room.items()}

    def until_s(self, wanted: float) -> float:
        """Seconds until so much is in it."""
        return max(0.0, wanted - self.level) * 60 / self.per_minute


@dataclass(slots=True)
class Account:
    """What one key uses. Sole owner of its numbers."""

    spent_tokens: int = 0  # of the budget, by calls that are over
    reserved_tokens: int = 0  # by calls under way
    running: dict[str, int] = field(default_factory=dict)  # ticket -> tokens
    requests: Bucket | None = None
    tokens: Bucket | None = None
    mean_s: float = 1.0  # that a call takes

    def fill(self, limits: Limits, now: float) -> Standing:
        self.requests = _filled(self.requests, limits.requests_per_minute, now)
        self.tokens = _filled(self.tokens, limits.tokens_per_minute, now)
        requests, tokens = self.requests, self.tokens
        return Standing(
            requests.level if requests else 0.0,
            requests.until_s(requests.per_minute) if requests else 0.0,
            tokens.level if tokens else 0.0,
            tokens.until_s(tokens.per_minute) if tokens else 0.0,
        )

    def denial(self, limits: Limits, tokens: int) -> tuple[What, float | None] | None:
        """Why a call of so many tokens may not start, and in how many seconds it may; None if it may."""
        if limits.budget_tokens is not None:
            if self.spent_tokens + tokens > limits.budget_tokens:
                return "budget", None
            if self.spent_tokens + self.reserved_tokens + tokens > limits.budget_tokens:
                return "budget", self.mean_s  # what is under way may give some back
        if self.tokens and tokens > self.tokens.per_minute:
            return "size", None
        if limits.concurrency is not None and len(self.running) >= limits.concurrency:
            return "concurrency", self.mean_s / max(1, limits.concurrency)
        waits: list[tuple[float, What]] = []
        if self.requests and self.requests.level < 1:
            waits.append((self.requests.until_s(1), "requests"))
        if self.tokens and self.tokens.level < tokens:
            waits.append((self.tokens.until_s(tokens), "tokens"))
        return (max(waits)[1], max(waits)[0]) if waits else None

    def take(self, ticket: Ticket, now: float) -> Ticket:
        """The same ticket with what is left after it. Raises Denied; then nothing is taken."""
        standing = self.fill(ticket.limits, now)
        denial = self.denial(ticket.limits, ticket.tokens)
        if denial is not None:
            raise Denied(*denial, standing)
        if self.requests:
            self.requests.take(ticket.id, 1)
        if self.tokens:
            self.tokens.take(ticket.id, ticket.tokens)
        self.running[ticket.id] = ticket.tokens
        self.reserved_tokens += ticket.tokens
        return replace(ticket, standing=self.fill(ticket.limits, now))

    def settle(self, ticket: Ticket, used_tokens: int, counts: bool, now: float) -> int:
        """What it did not use goes back, what it used beyond that is owed. Returns what the budget is charged; a ticket
        that was settled before charges nothing."""
        tokens = self.running.pop(ticket.id, None)
        if tokens is None:
            return 0
        used = used_tokens if counts else 0
        self.reserved_tokens -= tokens
        self.spent_tokens += used
        self.fill(ticket.limits, now)
        if self.tokens:
            self.tokens.give_back(ticket.id, tokens - used)
        if self.requests:
            self.requests.give_back(ticket.id, 0 if counts else 1)
        if counts:
            self.mean_s += _LATEST * (now - ticket.at_s - self.mean_s)
        return used

    def check(self) -> None:
        """Whether it can be true."""
        assert self.reserved_tokens == sum(self.running.values())
        assert self.spent_tokens >= 0 <= self.reserved_tokens
        for bucket in filter(None, (self.requests, self.tokens)):
            assert bucket.level <= bucket.per_minute
            assert bucket.room.keys() <= self.running.keys(), "somebody who is gone may still give back"


def _filled(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None or bucket.per_minute != per_minute:
        return Bucket(per_minute, per_minute, now)
    bucket.fill(now)
    return bucket


class Ledger:
    """The accounts of all keys that have called. Forgets none: there are no more than keys."""

    def __init__(self, spent: Mapping[str, int] | None = None) -> None:
        """`spent`: tokens of each key's budget that earlier processes counted."""
        self._accounts = {key_id: Account(tokens) for key_id, tokens in (spent or {}).items()}
        self._taken = 0

    def take(self, key_id: str, limits: Limits, tokens: int, now: float) -> Ticket:
        """Raises Denied; then nothing is taken."""
        self._taken += 1
        ticket = Ticket(f"{self._taken}", key_id, limits, tokens, now)
        return self._accounts.setdefault(key_id, Account()).take(ticket, now)

    def settle(self, ticket: Ticket, used_tokens: int, counts: bool, now: float) -> int:
        """See `Account.settle`."""
        return self._accounts[ticket.key_id].settle(ticket, used_tokens, counts, now)

    def running(self, key_id: str) -> int:
        return len(self._accounts[key_id].running) if key_id in self._accounts else 0

    def spent_tokens(self, key_id: str) -> int:
        return self._accounts[key_id].spent_tokens if key_id in self._accounts else 0

    def check(self) -> None:
        """Whether the accounts can be true."""
        for account in self._accounts.values():
            account.check()


class InProcess:
    """A `Store` of this process alone. `charged` is told what a budget was charged, to write it down."""

    def __init__(
        self, ledger: Ledger, now_s: Callable[[], float], charged: Callable[[str, int], None] = lambda key, used: None
    ) -> None:  # fmt: skip
        self.ledger = ledger
        self._now_s = now_s
        self._charged = charged

    async def take(self, key_id: str, limits: Limits, tokens: int) -> Ticket:
        return self.ledger.take(key_id, limits, tokens, self._now_s())

    async def settle(self, ticket: Ticket, used_tokens: int, counts: bool = True) -> None:
        charged = self.ledger.settle(ticket, used_tokens, counts, self._now_s())
        if charged:
            self._charged(ticket.key_id, charged)

    async def close(self) -> None:
        """Nothing is open."""
