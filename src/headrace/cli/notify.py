"""Tells the service manager that started a server when it takes requests, and then, as long as the server can go on,
that it lives: one that says nothing for too long is started again. This is systemd's `Type=notify` and `WatchdogSec=`
(sd_notify(3)); where nobody listens, nothing is said. Owns no state but the address.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.core import clock
from headrace.core.ports import Service

_EVERY_S = 10.0  # what the manager shows of it is renewed


@dataclass(frozen=True, slots=True)
class Manager:
    """`address`: a datagram socket; `patience_s`: the silence after which it acts, if it does."""

    address: str | None = None
    patience_s: float | None = None

    def ready(self) -> None:
        self._say("READY=1")

    async def watched(self, models: Mapping[str, Service]) -> None:
        """Until cancelled. As in /health/live, a server lives while one of its models does; a model that has failed
        stays so, and one that stalls or restarts looks after itself."""
        while self.address is not None:
            now = [model.status() for model in models.values()]
            lives = ("WATCHDOG=1",) if any(one.state != "failed" for one in now) else ()
            told = (f"{one.model} {one.state}, {one.running} running, {one.waiting} waiting" for one in now)
            self._say(f"STATUS={'; '.join(told)}", *lives)
            await clock.sleep(min(_EVERY_S, (self.patience_s or 2 * _EVERY_S) / 2))

    def _say(self, *lines: str) -> None:
        """A manager that went away is not worth an error."""
        if self.address is None:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.setblocking(False)
            speaker.sendto("\n".join(lines).encode(), self.address.replace("@", "\0", 1))
