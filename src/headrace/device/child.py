"""One process that computes, as its parent sees it: started, told what to load, ended. Blocking, all of it; owns the
process and our end of the socket to it.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from headrace.core.facts import LoadFacts, ModelFacts
from headrace.core.types import HeadraceError
from headrace.device import wire
from headrace.device.nursery import Adopted, Nursery

_LOADS_SILENTLY_S = 120.0  # a file system may keep it waiting, but a sign of life comes every second
_CHUNK = 1 << 20


class NotLoaded(HeadraceError):
    """The model cannot be loaded, or the process ended on the way; a sentence."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the process, and what it is to load. `load.kv_fd` is inherited."""

    command: tuple[str, ...]  # to which the number of the socket is appended
    load: wire.Load
    nursery: Nursery | None = None  # where it comes from instead, if that is faster


class Child:
    """One process, from its start to its end, and our end of the socket to it."""

    def __init__(self, launch: Launch) -> None:
        self.end_of_ours, theirs = socket.socketpair()
        self.killed = False  # by us
        self.process: subprocess.Popen[bytes] | Adopted
        if launch.nursery is not None:
            with theirs:
                self.process = launch.nursery.child(theirs, launch.load.kv_fd)
            return
        inherited = [theirs.fileno()] + ([] if launch.load.kv_fd is None else [launch.load.kv_fd])
        with theirs:
            self.process = subprocess.Popen(
                [*launch.command, str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=inherited, process_group=0
            )

    def look(self, loads: Sequence[wire.Load]) -> list[wire.Seen]:
        """What they are, and will take; `load` may follow. Raises NotLoaded."""
        found: list[wire.Seen] = []
        for message in self._ask(wire.Look(tuple(loads))):
            if isinstance(message, wire.Seen):
                found.append(message)
                if len(found) == len(loads):
                    break
        return found

    def load(
        self,
        what: wire.Load,
        phase: Callable[[str], None],
        opened: Callable[[ModelFacts], None],
        packed: Callable[[int], None] = lambda _: None,
    ) -> tuple[ModelFacts, LoadFacts]:
        """Raises NotLoaded."""
        model: ModelFacts | None = None
        for message in self._ask(what):
            match message:
                case wire.Phase():
                    phase(message.what)
                case wire.Packed():
                    packed(message.nbytes)
                case wire.Opened():
                    model = message.facts
                    opened(model)
                case wire.Loaded() if model is not None:
                    return model, message.facts
        raise AssertionError("it goes on until it has answered")

    def _ask(self, what: wire.Load | wire.Look) -> Iterator[wire.FromChild]:
        """What it says until somebody has heard enough. Raises NotLoaded if that is the end."""
        self.end_of_ours.settimeout(_LOADS_SILENTLY_S)
        reader = wire.from_child()
        try:
            self.end_of_ours.sendall(wire.frame(what))
            while data := self.end_of_ours.recv(_CHUNK):
                for message in reader.feed(data):
                    if isinstance(message, wire.Refused):
                        raise NotLoaded(message.message)
                    yield message
        except TimeoutError as error:
            raise NotLoaded(f"the process that loads the model was silent for {_LOADS_SILENTLY_S:.0f} s") from error
        except OSError:
            pass  # it has ended: the status says how
        raise NotLoaded(f"the process that loads the model ended: {ended(self.end())}")

    def kill(self) -> None:
        self.killed = True
        with suppress(OSError):
            self.process.kill()

    def end(self) -> int:
        """Its exit status; nothing is left of it afterwards. It has nothing to save."""
        with suppress(OSError):
            self.end_of_ours.close()
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(0.05)  # it may have ended by itself, in its own way
        self.process.kill()
        return self.process.wait()


def ended(status: int) -> str:
    """What an exit status means, in words."""
    if status >= 0:
        return f"the process ended by itself with status {status}; the lines above may say why"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    because = {
        "SIGKILL": "somebody killed it, or the machine ran out of memory",
        "SIGSEGV": "it crashed",
        "SIGABRT": "it crashed",
        "SIGBUS": "it crashed: a file that it had mapped was cut short, or memory ran out",
    }
    return f"the process ended by {name}: {because.get(name, 'somebody stopped it')}"
