"""The files that a server writes while it serves: its traffic, and its plans. A file that cannot be written any more
ends the recording, never the service.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from headrace.core.config import BadSetting, EngineSettings
from headrace.core.events import Event
from headrace.core.ports import Executor, Observer, Service

LOG = logging.getLogger("headrace")


class Recordings:
    """Opens both files at once, so that a bad path is found before the model is loaded; both may be None. The secret
    that hides block names and tenants is made here and written nowhere."""

    def __init__(self, traffic: Path | None, plans: Path | None) -> None:
        self._traffic = _create(traffic) if traffic else None
        self._plans = _create(plans) if plans else None
        self._wrap: Callable[[Service], Service] = lambda service: service

    def __enter__(self) -> Recordings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._traffic, self._plans):
            if file is not None:
                with suppress(OSError):  # what could not be written was said
                    file.close()

    @property
    def active(self) -> bool:
        return self._traffic is not None or self._plans is not None

    def watched(
        self,
        executor: Executor,
        observer: Observer,
        settings: EngineSettings,
        token_budget: int,
        step_s: tuple[float, float] | None = None,
    ) -> tuple[Executor, Observer]:
        """What the scheduler should be given instead."""
        from headrace.sim import recording
        from headrace.workload import record

        if self._traffic is not None:
            traffic = record.Recorder(self._traffic, executor.capacity.block_tokens, secrets.token_bytes(32))
            observer = Both(observer, traffic)
            self._wrap = lambda service: record.Recorded(service, traffic)
        if self._plans is not None:
            write = Guarded(self._plans)
            plans = recording.Recorder(
                executor, observer, write, settings=settings, token_budget=token_budget, step_s=step_s
            )
            return plans, plans
        return executor, observer

    def noted(self, service: Service) -> Service:
        """The service that tells the traffic's recorder of every request."""
        return self._wrap(service)


class Both:
    """Two observers as one."""

    def __init__(self, first: Observer, second: Observer) -> None:
        self._first, self._second = first, second

    def observe(self, event: Event) -> None:
        self._first.observe(event)
        self._second.observe(event)


class Guarded:
    """Writes lines of bytes as text until that fails, and says so once."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._failed = False

    def __call__(self, line: bytes) -> None:
        if self._failed:
            return
        try:
            self._file.write(line.decode())
        except OSError as error:
            self._failed = True
            LOG.error("plans are no longer recorded: %s", error)


def _create(path: Path) -> TextIO:
    """A new file, readable by its owner alone. Raises BadSetting."""
    try:
        path.touch(mode=0o600, exist_ok=False)
        return path.open("w", encoding="utf-8", buffering=1)
    except FileExistsError as error:
        raise BadSetting(f"{path} exists; a recording overwrites nothing, so name another file") from error
    except OSError as error:
        raise BadSetting(f"cannot record to {path}: {error}") from error
