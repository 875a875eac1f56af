"""Processes that are forked from one that has imported everything: they compute, their end is told as of any child, the
memory that they are given is ours, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headrace.core.config import DeviceSettings
from headrace.core.types import HeadraceError
from headrace.device.child import Child, Launch, NotLoaded, ended
from headrace.device.nursery import Nursery, possible
from headrace.device.wire import Load

WORKER = Path(__file__).with_name("fake_worker.py")
COMMAND = (sys.executable, str(WORKER))
pytestmark = pytest.mark.skipif(not possible(), reason="needs Linux")


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    one = Nursery((*COMMAND, "nursery"))
    yield one
    one.close()
    left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in left if str(WORKER) in child.cmdline()]


def launch(nursery: Nursery, folder: Path, kv_fd: int | None = None) -> Launch:
    return Launch(COMMAND, Load(str(folder), DeviceSettings(), 4, 8, 16, kv_fd=kv_fd), nursery)


def loaded(one: Launch) -> Child:
    child = Child(one)
    said: list[str] = []
    model, facts = child.load(one.load, said.append, lambda _: None)
    assert model.name == "fake" and facts.capacity.blocks == 64 and said == ["open the folder", "think"]
    return child


def test_children_are_of_one_nursery_and_end_alone(nursery: Nursery, tmp_path: Path) -> None:
    first, second = (loaded(launch(nursery, tmp_path)) for _ in range(2))
    parents = {psutil.Process(child.process.pid).ppid() for child in (first, second)}
    assert parents == {os.getpid()}, "they are ours"
    first.kill()
    assert first.end() == first.end() == -signal.SIGKILL and "somebody killed it" in ended(first.end())
    assert psutil.pid_exists(second.process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        second.process.wait(0.01)
    second.kill()
    second.end()


def test_a_refusal_and_an_end_by_itself_are_told(nursery: Nursery, tmp_path: Path) -> None:
    (tmp_path / "refuse").write_text("no room")
    child = Child(launch(nursery, tmp_path))
    with pytest.raises(NotLoaded, match="no room"):
        child.load(launch(nursery, tmp_path).load, lambda _: None, lambda _: None)
    assert child.end() == 0


def test_memory_for_kv_outlives_the_child(nursery: Nursery, tmp_path: Path) -> None:
    memory = os.memfd_create("test")
    child = loaded(launch(nursery, tmp_path, memory))
    child.kill()
    child.end()
    assert os.pread(memory, 10, 0) == b"kept"
    os.close(memory)


def test_a_nursery_that_was_killed_is_started_again(nursery: Nursery, tmp_path: Path) -> None:
    first = loaded(launch(nursery, tmp_path))
    assert nursery._process is not None
    nursery._process.kill()
    nursery._process.wait()
    assert psutil.pid_exists(first.process.pid), "what it has forked goes on"
    second = loaded(launch(nursery, tmp_path))
    for child in (first, second):
        child.kill()
        assert child.end() == -signal.SIGKILL


def test_one_that_cannot_be_started_is_one_sentence(tmp_path: Path) -> None:
    broken = Nursery((sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(HeadraceError, match="the process that starts those that compute ended"):
        Child(launch(broken, tmp_path))
    broken.close()
