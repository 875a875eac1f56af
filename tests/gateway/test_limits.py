"""Accounts by property, and limits of keys over the application: never too much, nothing leaked, all refunded."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gateway_rig import RoteService, ask, chat, make_text
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.types import Overloaded, Unavailable
from headrace.gateway.app import build
from headrace.gateway.endpoints import Extras
from headrace.gateway.gate import lasting, priced
from headrace.gateway.keys import Guard, Key, Keyring, digest, new_secret
from headrace.gateway.limits import Denied, InProcess, Ledger, Limits, Ticket
from headrace.gateway.openai import DIALECTS

CHAT = "/v1/chat/completions"
SECRET = new_secret()
MAYBE = st.none() | st.integers(1, 50)
ALL = st.builds(
    Limits, MAYBE, st.none() | st.integers(1, 500), st.none() | st.integers(1, 3), st.none() | st.integers(1, 2000)
)


class Accounts(RuleBasedStateMachine):
    """Any order of calls, ends and time: the books are true, and nobody ever has more than its limits."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.now_s, self.limits = Ledger(), 0.0, Limits(6, 200, 2, 900)
        self.open: list[Ticket] = []
        self.taken: list[tuple[float, int]] = []  # (when, tokens that are gone for good) of requests that count

    @rule(tokens=st.integers(0, 250))
    def call(self, tokens: int) -> None:
        try:
            ticket = self.ledger.take("k", self.limits, tokens, self.now_s)
        except Denied as denied:
            assert denied.retry_after_s is None or 1 <= denied.retry_after_s <= 600
            return
        self.open.append(ticket)
        assert len(self.open) <= 2

    @precondition(lambda self: self.open)
    @rule(data=st.data(), counts=st.booleans())
    def end(self, data: Any, counts: bool) -> None:
        ticket = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        used = data.draw(st.integers(0, ticket.tokens))
        assert self.ledger.settle(ticket, used, counts, self.now_s) == (used if counts else 0)
        assert self.ledger.settle(ticket, used, counts, self.now_s) == 0, "it was settled already"
        if counts:
            self.taken.append((ticket.at_s, used))

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def nobody_has_more(self) -> None:
        self.ledger.check()
        assert self.ledger.running("k") == len(self.open)
        held = self.taken + [(ticket.at_s, ticket.tokens) for ticket in self.open]
        assert sum(tokens for _, tokens in held) <= 900
        for begin_s, _ in held:
            window = [tokens for at_s, tokens in held if at_s >= begin_s]
            minutes = (self.now_s - begin_s) / 60
            assert len(window) <= 6 * (1 + minutes) + 1e-6
            assert sum(window) <= 200 * (1 + minutes) + 1e-6


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=80, stateful_step_count=40, derandomize=True, deadline=None)


@given(ALL, st.lists(st.tuples(st.integers(0, 600), st.integers(0, 300), st.booleans(), st.floats(0, 30)), max_size=30))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_what_is_told_to_wait_is_enough(limits: Limits, calls: list[tuple[int, int, bool, float]]) -> None:
    """Whoever stays away as long as was said, alone, is let in by the limits per minute."""
    ledger, now_s = Ledger(), 0.0
    for tokens, used, counts, wait_s in calls:
        try:
            ticket = ledger.take("k", limits, tokens, now_s)
        except Denied as denied:
            if (
                denied.what in ("requests", "tokens")
                and denied.retry_after_s is not None
                and denied.retry_after_s < 600
            ):
                now_s += denied.retry_after_s + 1e-6
                ledger.settle(ledger.take("k", limits, tokens, now_s), used, counts, now_s)
        else:
            now_s += wait_s
            ledger.settle(ticket, used, counts, now_s)
        ledger.check()
        assert ledger.running("k") == 0


def test_a_debt_is_paid_before_the_next_call() -> None:
    ledger, limits = Ledger(), Limits(tokens_per_minute=60)
    ledger.settle(ledger.take("k", limits, 10, 0.0), 90, True, 0.0)  # 30 more than there were
    with pytest.raises(Denied) as denied:
        ledger.take("k", limits, 10, 0.0)
    assert denied.value.what == "tokens" and denied.value.retry_after_s == pytest.approx(40)
    ledger.take("k", limits, 10, 40.0)


def test_a_budget_that_earlier_processes_spent_stays_spent() -> None:
    limits = Limits(budget_tokens=100)
    ledger = Ledger({"k": 60})
    with pytest.raises(Denied) as denied:
        ledger.take("k", limits, 41, 0.0)
    assert denied.value.what == "budget" and denied.value.retry_after_s is None
    ticket = ledger.take("k", limits, 40, 0.0)
    with pytest.raises(Denied) as denied:
        ledger.take("k", limits, 1, 0.0)
    assert denied.value.retry_after_s is not None  # what is under way may give some back
    ledger.settle(ticket, 10, True, 1.0)
    assert ledger.spent_tokens("k") == 70


@pytest.mark.parametrize(("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (7, "7s"), (59.2, "1m0s"), (360, "6m0s")])
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert lasting(seconds) == text


# -- over the application ----------------------------------------------------------------------------------------------


class Limited:
    """An application with one key, and a clock that stands still until it is told."""

    def __init__(
        self, service: RoteService | None = None, priority: int = 0, weight: float = 1.0, **limits: int
    ) -> None:
        self.service, self.now_s, self.charged = service or RoteService(), 0.0, list[int]()
        salt = b"salt"
        key = Key("k1", "k", "t", digest(SECRET, salt), limits=Limits(**limits), priority=priority, weight=weight)
        ring = Keyring.of(salt, [key])
        self.ledger = Ledger()
        store = InProcess(self.ledger, lambda: self.now_s, lambda _, tokens: self.charged.append(tokens))
        extras = Extras(guard=Guard(lambda: ring), limits=store)
        self.app = build(self.service, make_text(), GatewaySettings(), Metrics(), extras)

    async def ask(self, path: str = CHAT, body: bytes | None = None, **fields: Any) -> tuple[int, dict[str, str], Any]:
        status, headers, answer = await ask(self.app, path, body or chat(**fields), headers={"x-api-key": SECRET})
        self.ledger.check()
        return status, headers, answer


def test_requests_per_minute_and_their_headers() -> None:
    up = Limited(requests_per_minute=2)
    seen = [asyncio.run(up.ask()) for _ in range(3)]
    assert [status for status, _, _ in seen] == [200, 200, 429]
    assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in seen] == ["1", "0", "0"]
    assert seen[0][1]["x-ratelimit-limit-requests"] == "2" and seen[0][1]["x-ratelimit-reset-requests"] == "30s"
    assert seen[2][1]["retry-after"] == "30" and json.loads(seen[2][2])["error"]["code"] == "rate_limit_exceeded"
    up.now_s = 30.0
    assert asyncio.run(up.ask())[0] == 200 and asyncio.run(up.ask())[0] == 429


def test_tokens_are_taken_at_arrival_and_corrected_at_the_end() -> None:
    up = Limited(tokens_per_minute=1000)
    for stream in (False, True):
        status, headers, answer = asyncio.run(up.ask(stream=stream, max_tokens=8))
        assert status == 200 and int(headers["x-ratelimit-remaining-tokens"]) < 1000
    status, _, answer = asyncio.run(up.ask(max_tokens=8))
    usage = json.loads(answer)["usage"]
    assert up.charged == [usage["total_tokens"]] * 3
    assert asyncio.run(up.ask(max_tokens=2000))[0] == 400  # more than a minute's worth
    assert asyncio.run(up.ask(max_tokens=990))[0] == 429


def test_a_spent_budget_is_said_without_a_time() -> None:
    up = Limited(budget_tokens=60)
    while (found := asyncio.run(up.ask()))[0] == 200:
        assert sum(up.charged[:-1]) + 2 + 4 <= 60  # let in by what was known when it came: 2 words, 4 tokens
    assert 60 - 6 < up.ledger.spent_tokens("k1") < 60 + up.charged[-1]
    assert found[0] == 429 and "retry-after" not in found[1]
    assert json.loads(found[2])["error"]["code"] == "insufficient_quota"


@pytest.mark.parametrize("error", [Overloaded("full", 7.0), Unavailable("draining"), RuntimeError("broken")])
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_server_refuses_costs_nothing(error: Exception, stream: bool) -> None:
    up = Limited(RoteService(refuse=error), requests_per_minute=1, tokens_per_minute=100, concurrency=1)
    assert [asyncio.run(up.ask(stream=stream))[0] for _ in range(3)] == [asyncio.run(up.ask())[0]] * 3
    up.service.refuse = None
    assert asyncio.run(up.ask())[0] == 200 and up.ledger.spent_tokens("k1") > 0


def test_what_a_client_does_wrong_counts_as_a_request_but_no_tokens() -> None:
    up = Limited(requests_per_minute=2, tokens_per_minute=100_000, budget_tokens=100_000)
    assert asyncio.run(up.ask(max_tokens=90_000))[0] == 400  # beyond the context: the handler refuses it
    assert up.ledger.spent_tokens("k1") == 0 and up.ledger.running("k1") == 0
    assert [asyncio.run(up.ask())[0] for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_give_their_place_back_and_pay_what_they_used(stream: bool) -> None:
    async def main() -> None:
        up = Limited(RoteService(stall_after=3), concurrency=1, budget_tokens=10_000)
        for _ in range(3):
            asking = asyncio.create_task(up.ask(stream=stream, max_tokens=500))
            while not up.service.open:
                await asyncio.sleep(0)
            assert (await up.ask())[0] == 429
            for _ in range(20):
                await asyncio.sleep(0.002)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert up.ledger.running("k1") == 0 and not up.service.open
        prompt = up.service.started[0].prompt_tokens
        assert 3 * prompt <= up.ledger.spent_tokens("k1") <= 3 * (prompt + 4)

    asyncio.run(main())


def test_a_place_is_free_before_the_answer_is_complete() -> None:
    """A client that asks again as soon as it has the last byte is never told that it is still here."""
    up = Limited(concurrency=1)

    async def main() -> None:
        for at in range(20):
            assert (await up.ask(stream=at % 2 == 0))[0] == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 2}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 16}),
        ("/v1/messages", {"model": "rote", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}),
        ("/api/chat", {"model": "rote", "messages": [{"role": "user", "content": "hello"}]}),
        ("/api/generate", {"model": "rote", "prompt": "hello"}),
        ("/tokenize", {"prompt": "hello"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_every_dialect_is_limited_and_ranked(path: str, fields: dict[str, Any]) -> None:
    up = Limited(requests_per_minute=1, priority=7, weight=2.5)
    body = json.dumps(fields).encode()
    assert asyncio.run(up.ask(path, body))[0] == 200
    for request in up.service.started:
        assert (request.priority, request.weight, request.tenant) == (7, 2.5, "t")
    status, headers, answer = asyncio.run(up.ask(path, body))
    assert status == 429 and "retry-after" in headers and b"try again" in answer


def test_a_client_may_lower_its_priority_and_never_raise_it() -> None:
    up = Limited(priority=5)
    for asked, given_ in ((100, 5), (0, 5), (-3, 2)):
        assert asyncio.run(up.ask(priority=asked))[0] == 200 and up.service.started[-1].priority == given_


def test_prices_are_bounds_of_what_is_asked() -> None:
    parse = {dialect.operation.path: dialect.parse for dialect in DIALECTS}
    up = Limited()
    context = next(route for route in up.app.routes if route.path == CHAT).app.apps["POST"].context
    call, _ = parse["/v1/completions"](
        json.dumps({"prompt": [[1, 2, 3], [4]], "max_tokens": 9, "n": 3}).encode(), context
    )
    assert priced(call) == (4, 54)
    call, _ = parse[CHAT](chat(max_tokens=9, n=2), context)
    assert priced(call) == (2, 18)
