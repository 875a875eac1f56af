"""The process that computes: reads plans from its one socket, performs them, answers. Holds weights and KV; its
end costs nobody more than time. It ends when its parent does, and by no signal that a terminal sends to all.

    main thread   | load | read plan | step | answer | read ...        a beat under way is one thread and no hand-over
    another       '.......'.......'.......'.......'.......             says every second that the process is alive
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headrace.core.facts import EncoderFacts, LoadFacts, ModelFacts
from headrace.core.ports import Executor
from headrace.core.step import StepPlan, StepResult
from headrace.core.types import HeadraceError
from headrace.device import wire

if TYPE_CHECKING:
    from headrace.device.encoder import Encoder
    from headrace.device.executor import ModelExecutor

_OOM_SCORE = "500"  # the kernel takes this process before the one that serves, when memory runs out


@dataclass(frozen=True, slots=True)
class Held:
    """What was loaded."""

    executor: ModelExecutor
    facts: LoadFacts
    encoder: Encoder | None = None


Loader = Callable[[wire.Load, Callable[[str], None], Callable[[ModelFacts], None], Callable[[int], None]], Held]
Looker = Callable[[wire.Load], wire.Seen]


class Channel:
    """The socket: whole messages in and out, from any thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._reader = wire.from_parent()

    def send(self, message: wire.FromChild) -> None:
        """Raises OSError if nobody listens any more."""
        data = wire.frame(message)
        with self._lock:
            self._end.sendall(data)

    def receive(self) -> wire.ToChild | None:
        """The next message; None when the parent has gone. Raises BadFrame."""
        header = self._exactly(wire.HEADER.size)
        if header is None:
            return None
        body = self._exactly(wire.length(header))
        return None if body is None else self._reader.decode(body)

    def _exactly(self, size: int) -> bytearray | None:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self._end.recv_into(view[got:])
            if not count:
                return None
            got += count
        return data


def main(end: socket.socket, load: Loader, look: Looker | None = None, kv_fd: int | None = None) -> int:
    """Serve one parent until it goes. Returns the exit status. `kv_fd` is the memory for KV, if it has another number
    here."""
    _stand_back()
    channel = Channel(end)
    threading.Thread(target=_live, args=(channel,), name="headrace-alive", daemon=True).start()
    with contextlib.suppress(OSError):  # the parent has gone, so nobody is left to answer
        while isinstance(first := channel.receive(), wire.Look) and look is not None:
            for what in first.loads:
                _answered(channel, lambda what=what: look(what))  # type: ignore[misc]
        if first is None:
            return 0
        if not isinstance(first, wire.Load):
            return 1
        if kv_fd is not None:
            first = msgspec.structs.replace(first, kv_fd=kv_fd)
        held: list[Held] = []
        if _answered(channel, lambda: _loaded(first, load, channel, held)):
            _Server(held[0], channel).serve()
    return 0


def _stand_back() -> None:
    """Signals to all of a terminal or a service are the parent's business; memory that runs out, rather this one's."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def _live(channel: Channel) -> None:
    """Say so every second; go when nobody listens, whatever the main thread is busy with."""
    pause = threading.Event()
    while not pause.wait(wire.HEARTBEAT_S):
        try:
            channel.send(wire.Alive())
        except OSError:
            os._exit(0)


def _loaded(what: wire.Load, load: Loader, channel: Channel, held: list[Held]) -> wire.Loaded:
    held.append(
        load(
            what,
            lambda phase: channel.send(wire.Phase(phase)),
            lambda facts: channel.send(wire.Opened(facts)),
            lambda nbytes: channel.send(wire.Packed(nbytes)),
        )
    )
    return wire.Loaded(held[0].facts)


def _answered(channel: Channel, work: Callable[[], wire.FromChild]) -> bool:
    """Say what comes of it; False if it was refused."""
    try:
        answer = work()
    except HeadraceError as error:
        answer = wire.Refused(str(error))
    except OSError as error:
        answer = wire.Refused(f"the model cannot be read: {error}")
    except Exception as error:
        traceback.print_exc()
        answer = wire.Refused(f"loading the model failed unexpectedly, see the lines above: {_told(error)}")
    channel.send(answer)
    return not isinstance(answer, wire.Refused)


def own_bytes() -> int:
    """Memory that would be free without this process; 0 where the system does not tell."""
    return _kilobytes("/proc/self/smaps_rollup", "Private_Dirty:")


def all_bytes() -> int:
    """With what it shares with the process that it is a fork of."""
    return _kilobytes("/proc/self/status", "RssAnon:")


def _kilobytes(file: str, field: str) -> int:
    with contextlib.suppress(OSError):
        lines = Path(file).read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
    return 0


class _Server:
    """Answers plans and texts to encode, in their order; of several lanes, side by side."""

    def __init__(self, held: Held, channel: Channel) -> None:
        self._held = held
        self._channel = channel
        self._loop: asyncio.AbstractEventLoop | None = None  # for several lanes, on a thread of its own

    def serve(self) -> None:
        """Until the parent goes."""
        while (message := self._channel.receive()) is not None:
            if isinstance(message, wire.Step):
                plan = wire.plan_in(message.plan)
                if len(plan.lanes) > 1:
                    self._beside(plan)
                else:
                    self._answer(plan.step, lambda plan=plan: self._held.executor.step(plan))  # type: ignore[misc]
            elif isinstance(message, wire.Encode):
                self._encode(message)

    def _answer(self, step: int, work: Callable[[], StepResult]) -> None:
        try:
            answer: wire.FromChild = wire.Done(work())
        except Exception as error:
            answer = wire.Failed(step, _told(error))
        self._channel.send(answer)

    def _beside(self, plan: StepPlan) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="headrace-lanes", daemon=True).start()

        def done(future: Future[StepResult]) -> None:
            self._answer(plan.step, future.result)

        executor: Executor = self._held.executor
        asyncio.run_coroutine_threadsafe(_run(executor, plan), self._loop).add_done_callback(done)

    def _encode(self, message: wire.Encode) -> None:
        encoder = self._held.encoder
        if encoder is None or encoder.loaded:
            self._encoded(message)
        else:  # steps go on while it is loaded
            threading.Thread(target=self._encoded, args=(message,), name="headrace-encoder", daemon=True).start()

    def _encoded(self, message: wire.Encode) -> None:
        try:
            if self._held.encoder is None:
                raise RuntimeError("there is no embedding model here")
            answer: wire.FromChild = wire.Encoded(message.number, self._held.encoder.step(message.sequences))
        except Exception as error:
            answer = wire.Failed(message.number, _told(error), encoding=True)
        self._channel.send(answer)


async def _run(executor: Executor, plan: StepPlan) -> StepResult:
    return await executor.run(plan)


def encoder_facts(encoder: Encoder, tokenizer_json: str) -> EncoderFacts:
    return EncoderFacts(encoder.encoding, tokenizer_json, encoder.nbytes)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def from_argument(text: str) -> socket.socket:
    """The socket that was inherited under this number."""
    if not text.isdecimal():
        sys.exit("this is started by headrace serve, not by hand")
    return socket.socket(fileno=int(text))
