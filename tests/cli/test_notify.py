"""What a service manager hears, on a real datagram socket and virtual time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.cli.notify import Manager
from headrace.core import clock, config
from headrace.core.ports import Capacity, Status


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


def heard(manager: socket.socket) -> list[str]:
    said = []
    try:
        while True:
            said.append(manager.recv(4096).decode())
    except BlockingIOError:
        return said


class Model:
    """A service of which only the state is asked."""

    def __init__(self, state: str) -> None:
        self.state = state

    def status(self) -> Status:
        capacity = Capacity(blocks=1, block_tokens=16, max_context_tokens=16, vocab=1)
        return Status("m", self.state, capacity, 2, 1, 0, 0, 0, 0.0)


def watch(manager: Manager, states: list[str], every_s: float, *others: str) -> None:
    """So many states of a model, one after the other, beside models that keep theirs."""

    async def main() -> None:
        models: Any = {str(at): Model(state) for at, state in enumerate((states[0], *others))}
        task = asyncio.create_task(manager.watched(models))
        for models["0"].state in states:
            await clock.sleep(every_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    clock.run(main(), virtual=True)


def test_it_lives_until_it_cannot_go_on(manager: socket.socket) -> None:
    told = Manager(str(manager.getsockname()), 30.0)
    told.ready()
    watch(told, ["ready", "stalled", "restarting", "failed"], 10.0)
    first, *rest = heard(manager)
    assert first == "READY=1"
    assert rest[0] == "STATUS=m ready, 2 running, 1 waiting\nWATCHDOG=1"
    assert [("WATCHDOG=1" in one) for one in rest if "failed" in one] == [False]
    assert all("WATCHDOG=1" in one for one in rest if "failed" not in one)


def test_it_lives_while_one_of_its_models_does(manager: socket.socket) -> None:
    watch(Manager(str(manager.getsockname()), 30.0), ["failed"], 35.0, "ready")
    said = heard(manager)
    assert len(said) >= 3 and all("WATCHDOG=1" in one and "m failed" in one for one in said)


def test_it_speaks_twice_within_the_patience(manager: socket.socket) -> None:
    watch(Manager(str(manager.getsockname()), 4.0), ["ready"], 16.0)
    assert len(heard(manager)) == pytest.approx(8, abs=1)


def test_where_nobody_listens_nothing_happens(tmp_path: Path) -> None:
    Manager(str(tmp_path / "nobody")).ready()
    watch(Manager(), ["ready"], 60.0)
    watch(Manager(str(tmp_path / "nobody"), 1.0), ["ready"], 3.0)


@pytest.mark.parametrize(("usec", "seconds"), [("30000000", 30.0), ("", None), ("0", None), ("x", None)])
def test_the_environment(monkeypatch: pytest.MonkeyPatch, usec: str, seconds: float | None) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@abstract")
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    assert config.service_manager() == ("@abstract", seconds)
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert config.service_manager()[0] is None
