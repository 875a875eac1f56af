"""What a server records: two files made anew, readable by their owner, and never a reason to stop serving."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from headrace.cli.recordings import Both, Guarded, Recordings
from headrace.core.config import BadSetting
from headrace.core.events import Event, Rejected


class Kept:
    """An observer that keeps."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def observe(self, event: Event) -> None:
        self.events.append(event)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("precious")
    with pytest.raises(BadSetting, match="exists"):
        Recordings(there, None)
    assert there.read_text() == "precious"
    with pytest.raises(BadSetting, match="cannot record"):
        Recordings(None, tmp_path / "no" / "folder.jsonl")


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    with Recordings(path, None):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_both_hear_everything_in_order() -> None:
    first, second = Kept(), Kept()
    event = Rejected(1.0, "a", "full")
    Both(first, second).observe(event)
    assert first.events == second.events == [event]


def test_a_full_disk_ends_the_recording_only(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        write = Guarded(full)
        for _ in range(3):
            write(b"line\n")
        assert caplog.text.count("no longer recorded") == 1
        try:
            full.close()
        except OSError:
            pass
