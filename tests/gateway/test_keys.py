"""Who asks: keys as values, the file of keys, and the door of every route."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import correlation, median
from time import perf_counter_ns
from typing import Any, TypeVar

import pytest
from gateway_rig import RoteService, ask, chat, make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.types import HeadraceError
from headrace.gateway import audience, server
from headrace.gateway.app import _routes, build
from headrace.gateway.endpoints import Extras
from headrace.gateway.errors import Refused
from headrace.gateway.keys import BadKey, Guard, Key, Keyring, digest, new_secret, presented, ring_of
from headrace.gateway.limits import Limits
from headrace.gateway.openapi import Operation
from headrace.gateway.state.keyfile import KeyFile, Wanted

T = TypeVar("T")
CHAT = "/v1/chat/completions"
NOW_S = 1_000_000
USER, ADMIN, REVOKED, EXPIRED, OTHER, NARROW = secrets = [new_secret() for _ in range(6)]
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


def ring() -> Keyring:
    salt = b"salt of this test"
    key = Key("u", "user", "alice", b"")
    keys = [
        key,
        replace(key, id="a", name="admin", tenant="ops", admin=True),
        replace(key, id="r", name="gone", revoked_s=NOW_S - 9),
        replace(key, id="e", name="old", expires_s=NOW_S),
        replace(key, id="o", name="other", tenant="bob"),
        replace(key, id="n", name="narrow", tenant="bob", models=("elsewhere",)),
    ]
    return Keyring.of(
        salt, [replace(key, digest=digest(secret, salt)) for key, secret in zip(keys, secrets, strict=True)]
    )


def guard(of: Keyring | None = None) -> Guard:
    return Guard(lambda: ring() if of is None else of, wall_s=lambda: NOW_S)


def app_of(service: RoteService | None = None, with_guard: Guard | None = None, **options: Any):
    extras = Extras(guard=with_guard or guard())
    return build(service or RoteService(), make_text(), GatewaySettings(**options), Metrics(), extras)


APP = app_of()
SENT = {  # what a client may send, and whether that is a key that holds
    "nothing": ({}, False),
    "wrong": ({"authorization": f"Bearer {new_secret()}"}, False),
    "empty": ({"authorization": "Bearer "}, False),
    "empty key": ({"x-api-key": ""}, False),
    "basic": ({"authorization": f"Basic {USER}"}, False),
    "bare": ({"authorization": USER}, False),
    "revoked": ({"authorization": f"Bearer {REVOKED}"}, False),
    "expired": ({"x-api-key": EXPIRED}, False),
    "beginning": ({"x-api-key": USER[:-1]}, False),
    "longer": ({"x-api-key": USER + "A"}, False),
    "absurd": ({"x-api-key": USER * 100}, False),
    "not ascii": ({"x-api-key": USER + "é"}, False),
    "NUL": ({"x-api-key": USER + "\0"}, False),
    "two": ({"x-api-key": USER, "authorization": f"Bearer {ADMIN}"}, False),
    "user": ({"authorization": f"Bearer {USER}"}, True),
    "lower case": ({"authorization": f"bearer {USER}"}, True),
    "anthropic": ({"x-api-key": USER}, True),
    "twice the same": ({"x-api-key": USER, "authorization": f"Bearer {USER}"}, True),
}


def paths() -> Iterator[tuple[str, set[str]]]:
    for route in APP.routes:
        yield route.path.replace("{model:path}", "rote").replace("{", "").replace("}", ""), route.methods


def spoiled(path: str) -> list[str]:
    """The same path as a careless filter may read it, and another part of the server not."""
    return ["/" + path, path.upper(), *(path + end for end in ("", "/", "//", "/..", "%2f", ";x", "\n", "?x=1"))]


@pytest.mark.parametrize("name", SENT)
def test_no_route_answers_whoever_has_no_key(name: str) -> None:
    headers, holds = SENT[name]
    public = set[str]()
    for path, _ in [*paths(), ("/nothing", set()), ("/v1", set()), ("", set())]:
        for method in METHODS:
            for way in spoiled(path) if name == "nothing" and method in ("GET", "POST", "OPTIONS") else [path]:
                status, got, body = run(ask(APP, way, chat(prompt="x"), method, headers))
                assert not any(header.startswith("access-control") for header in got)
                if status != 401 and not holds:
                    public.add(f"{method} {way.partition('?')[0]}")
                    assert name == "nothing" and json.loads(body) == {"status": "ready"}, (method, way, name, status)
                elif holds:
                    assert status != 401, (method, way, name)
                else:
                    assert got["www-authenticate"] == "Bearer" and json.loads(body)["error"]
    open_ = {f"{method} /health/{page}" for method in ("GET", "HEAD") for page in ("live", "ready")}
    assert public == (open_ if name == "nothing" else set())


def test_admin_routes_are_closed_to_users() -> None:
    closed = []
    for path, methods in paths():
        for method in methods:
            as_user = run(ask(APP, path, chat(prompt="x"), method, {"x-api-key": USER}))
            as_admin = run(ask(APP, path, chat(prompt="x"), method, {"x-api-key": ADMIN}))
            assert as_admin[0] not in (401, 403)
            if as_user[0] == 403:
                closed.append(f"{method} {path}")
                assert json.loads(as_user[2])["error"]["code"] == "admin_only"
    assert {name.replace("HEAD", "GET") for name in closed} == set(audience.ADMIN)


def test_a_route_nobody_decided_about_is_not_built() -> None:
    async def page(_: Any) -> Any: ...

    with pytest.raises(HeadraceError, match=r"POST /new.*audience"):
        _routes([(Operation("/new", "POST", "", {}, None), page)])


def test_the_policy_names_no_route_that_is_not_there() -> None:
    served = {f"{method} {route.path}" for route in APP.routes for method in route.methods - {"HEAD"}}
    assert served == audience.PUBLIC | audience.USER | audience.ADMIN
    assert not audience.PUBLIC & audience.USER and not audience.ADMIN & (audience.USER | audience.PUBLIC)


def test_without_keys_everything_is_open_and_keys_are_ignored() -> None:
    app = app_of(with_guard=Guard())
    for headers in ({}, {"authorization": "Bearer none"}, {"x-api-key": "x" * 2000}):
        assert run(ask(app, CHAT, chat(), headers=headers))[0] == 200
        assert run(ask(app, "/metrics", method="GET", headers=headers))[0] == 200


def test_health_tells_details_to_admins_only() -> None:
    for secret in (None, USER):
        headers = {"x-api-key": secret} if secret else {}
        assert json.loads(run(ask(APP, "/health/ready", method="GET", headers=headers))[2]) == {"status": "ready"}
    assert "running" in json.loads(run(ask(APP, "/health/ready", method="GET", headers={"x-api-key": ADMIN}))[2])


@given(
    st.lists(
        st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"cookie"]), st.binary(max_size=40)), max_size=4
    )
)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_headers_hold_one_secret_or_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        secret = presented(headers)
    except Refused as refusal:
        assert refusal.status == 401
        return
    given_ = [value for name, value in headers if name != b"cookie"]
    assert (secret is None) == (not given_)
    if secret is not None:
        assert secret.isascii() and secret.isprintable() and " " not in secret
        assert {value.split(b" ")[-1] or value.strip().split(b" ")[-1] for value in given_} == {secret.encode()}


def test_two_headers_of_the_same_name_are_refused() -> None:
    both = [(b"authorization", f"Bearer {USER}".encode()), (b"authorization", f"Bearer {ADMIN}".encode())]
    for headers in (both, both[:1] * 2, [(b"x-api-key", USER.encode()), (b"x-api-key", ADMIN.encode())]):
        with pytest.raises(Refused):
            presented(headers)


def test_the_tenant_is_the_keys_whatever_a_client_says() -> None:
    service = RoteService()
    app = app_of(service)
    lies = {"x-tenant": "bob", "x-tenant-id": "bob", "x-forwarded-user": "bob", "openai-organization": "bob"}
    for secret, tenant in ((USER, "alice"), (OTHER, "bob")):
        headers = {"x-api-key": secret} | lies | {"openai-project": "p"}
        assert run(ask(app, CHAT, chat(user="bob"), headers=headers))[0] == 200
        assert service.started[-1].tenant == tenant
    assert run(ask(app, CHAT, chat(tenant="bob"), headers={"x-api-key": USER}))[0] == 400


def test_a_key_uses_the_models_it_names_and_sees_no_others() -> None:
    headers = {"x-api-key": NARROW}
    hello = {"model": "rote", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
    for path, body in (
        (CHAT, chat()),
        ("/v1/completions", json.dumps({"model": "rote", "prompt": "hello"}).encode()),
        ("/v1/responses", json.dumps({"model": "rote", "input": "hello"}).encode()),
        ("/v1/messages", json.dumps(hello).encode()),
        ("/api/chat", json.dumps({"model": "rote", "messages": [{"role": "user", "content": "hello"}]}).encode()),
        ("/api/show", json.dumps({"model": "rote"}).encode()),
        ("/tokenize", json.dumps({"model": "rote", "prompt": "hello"}).encode()),
        ("/v1/embeddings", json.dumps({"input": "hello"}).encode()),
    ):
        status, _, answer = run(ask(APP, path, body, headers=headers))
        assert status == 403 and b"may not use" in answer, (path, answer)
    assert json.loads(run(ask(APP, "/v1/models", method="GET", headers=headers))[2])["data"] == []
    assert json.loads(run(ask(APP, "/api/tags", method="GET", headers=headers))[2])["models"] == []
    assert run(ask(APP, "/v1/models/rote", method="GET", headers=headers))[0] == 404


def test_tenants_share_no_kv_and_one_tenant_does() -> None:
    service = RoteService()
    app = app_of(service)
    body = chat(messages=[{"role": "user", "content": "what is a headrace? " * 40}])
    for secret in (USER, OTHER, USER, ADMIN):
        assert run(ask(app, CHAT, body, headers={"x-api-key": secret}))[0] == 200
    alice, bob, again, ops = (set(request.block_keys) for request in service.started)
    assert alice and alice == again
    assert not alice & bob and not alice & ops and not bob & ops
    salted = chat(messages=[{"role": "user", "content": "what is a headrace? " * 40}], cache_salt="bob")
    assert run(ask(app, CHAT, salted, headers={"x-api-key": USER}))[0] == 200
    assert not set(service.started[-1].block_keys) & (alice | bob | ops)


# -- what is secret stays secret ---------------------------------------------------------------------------------------


def test_nothing_that_can_be_shown_has_a_secret_or_a_digest() -> None:
    key = next(iter(ring().by_digest.values()))
    assert repr(key.digest) not in repr(key) and USER not in repr(ring()) and "digest" not in repr(key)


def test_a_secret_is_256_random_bits() -> None:
    many = {new_secret() for _ in range(1000)}
    assert len(many) == 1000 and all(len(one) == 3 + 43 and one.startswith("hr-") for one in many)


def test_the_time_of_a_wrong_key_says_nothing_about_the_right_one() -> None:
    """How long the common beginning is and how long the answer takes have nothing to do with each other."""
    found, wrong = ring(), [USER[:at] + "~" * (len(USER) - at) for at in range(len(USER))]
    taken: list[list[int]] = [[] for _ in wrong]
    for _ in range(400):
        for at, secret in enumerate(wrong):
            begin = perf_counter_ns()
            assert found.find(secret) is None
            taken[at].append(perf_counter_ns() - begin)
    medians = [median(times) for times in taken]
    assert abs(correlation(range(len(wrong)), medians)) < 0.5 or max(medians) - min(medians) < 0.2 * min(medians)


def test_the_same_secret_looks_different_in_every_file() -> None:
    assert digest(USER, b"one") != digest(USER, b"two") and len(digest(USER, b"one")) == 32


@pytest.mark.parametrize(
    "secret", ["short", "with space in the middle of it", "é" * 20, "x" * 600, "tab\tin the key......"]
)
def test_a_bad_key_in_the_environment_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(BadKey) as refused:
        ring_of(secret)
    assert secret not in str(refused.value)


def test_a_key_in_the_environment_is_an_admins() -> None:
    assert not Guard(own=ring_of(None)).asks
    guarded = Guard(own=ring_of("from-the-environment"))
    caller = guarded.caller([(b"x-api-key", b"from-the-environment")])
    assert guarded.asks and caller is not None and caller.admin and caller.tenant == ""
    assert guarded.caller([]) is None


# -- where one may listen ----------------------------------------------------------------------------------------------


def test_with_keys_one_may_listen_everywhere() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(HeadraceError, match="headrace keys add"):
            server.check(GatewaySettings(host=host, port=0), Guard().asks)
        server.check(GatewaySettings(host=host, port=0), guard().asks)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[KeyFile]:
    file = KeyFile(tmp_path / "sub" / "keys.sqlite3")
    yield file
    file.close()


def test_a_missing_file_asks_for_nothing_and_is_not_made(file: KeyFile) -> None:
    assert not Guard(file.current).asks and not file.all() and not file.spent()
    assert not file.path.parent.exists()


def test_keys_come_back_as_they_were_made(file: KeyFile) -> None:
    limits = Limits(60, 1000, 2, 5_000_000)
    secret = new_secret()
    key = file.add(Wanted("alice", "research", True, ("a", "b/c"), limits, -3, 2.5, NOW_S + 1), secret, NOW_S)
    assert file.all() == [key] == [file.find("alice")] and key.limits == limits and key.models == ("a", "b/c")
    assert file.current().find(secret) == key and file.current().find(secret + "x") is None
    assert file.path.stat().st_mode & 0o777 == 0o600 and file.path.parent.stat().st_mode & 0o777 == 0o700
    for name in file.path.parent.iterdir():
        assert secret.encode() not in name.read_bytes() and name.stat().st_mode & 0o077 == 0


def test_a_server_sees_every_change_at_its_next_request(file: KeyFile) -> None:
    guarded, secret, shell = Guard(file.current, wall_s=lambda: NOW_S), new_secret(), KeyFile(file.path)
    assert guarded.caller([]) is not None  # nobody is asked
    shell.add(Wanted("alice", "alice"), secret, NOW_S)
    sent = [(b"x-api-key", secret.encode())]
    assert guarded.caller([]) is None
    caller = guarded.caller(sent)
    assert caller is not None and caller.tenant == "alice" and not caller.admin
    assert guarded.by_id(caller.key.id if caller.key else "") == caller
    shell.revoke("alice", NOW_S)
    with pytest.raises(Refused, match="revoked"):
        guarded.caller(sent)
    with pytest.raises(Refused, match="revoked"):
        guarded.by_id(caller.key.id if caller.key else "")
    shell.add(Wanted("alice", "alice"), new_secret(), NOW_S)  # the name is free again, the old key is not
    with pytest.raises(Refused, match="revoked"):
        guarded.caller(sent)


def test_names_are_unique_among_keys_that_hold(file: KeyFile) -> None:
    file.add(Wanted("alice", "alice"), new_secret(), NOW_S)
    with pytest.raises(BadKey, match="already"):
        file.add(Wanted("alice", "bob"), new_secret(), NOW_S)
    with pytest.raises(BadKey, match="no key 'bob'"):
        file.revoke("bob", NOW_S)


def test_a_file_that_goes_away_or_breaks_opens_nothing(file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    secret = new_secret()
    file.add(Wanted("alice", "alice"), secret, NOW_S)
    guarded = Guard(file.current)
    assert guarded.caller([]) is None
    moved = file.path.rename(file.path.with_name("moved"))
    assert guarded.caller([]) is None and guarded.caller([(b"x-api-key", secret.encode())]) is not None
    file.path.write_bytes(b"this is no database, whatever its name says" * 40)
    assert guarded.caller([]) is None and guarded.caller([(b"x-api-key", secret.encode())]) is not None
    assert len(caplog.records) == 1
    file.path.unlink()
    moved.rename(file.path)
    KeyFile(file.path).revoke("alice", NOW_S)
    with pytest.raises(Refused):
        guarded.caller([(b"x-api-key", secret.encode())])


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite3"
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(BadKey, match=r"keys[.]sqlite3"):
        KeyFile(path).all()


def test_what_is_spent_is_written_down(file: KeyFile) -> None:
    key = file.add(Wanted("alice", "alice"), new_secret(), NOW_S)
    for tokens in (10, 5, 1):
        file.charge(key.id, tokens)
    file.charge("nobody", 3)
    file.close()
    assert KeyFile(file.path).spent() == {key.id: 16}


def test_an_acknowledged_key_survives_kill_9(file: KeyFile) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom headrace.gateway.state.keyfile import KeyFile, Wanted\n"
        "from headrace.gateway.keys import new_secret\nfile = KeyFile(Path(sys.argv[1]))\n"
        "for at in range(10**6):\n  file.add(Wanted(f'k{at}', 't'), new_secret(), 1)\n  print(at, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(file.path)], stdout=subprocess.PIPE, text=True
    ) as writing:
        assert writing.stdout is not None
        for _ in range(20):
            acknowledged = int(writing.stdout.readline())
        os.kill(writing.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writing.stdout.read().split())])
    names = [key.name for key in KeyFile(file.path).all()]
    assert names == [f"k{at}" for at in range(len(names))] and len(names) - 1 in (acknowledged, acknowledged + 1)
    with sqlite3.connect(file.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_many_writers_lose_nothing(file: KeyFile) -> None:
    key = file.add(Wanted("alice", "alice"), new_secret(), NOW_S)
    others = [KeyFile(file.path) for _ in range(4)]
    threads = [threading.Thread(target=lambda of=of: [of._charge(key.id, 1) for _ in range(10)]) for of in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.spent() == {key.id: 40}
