"""The process that computes: reads plans from its one socket, performs them, answers. Holds torch, weights and KV; its
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

from headrace.core.facts import EncoderFacts, LoadFacts, ModelFacts
from headrace.core.ports import Executor
from headrace.core.step import StepPlan, StepResult
from headrace.core.types import HeadraceError
from headrace.device import wire

if TYPE_CHECKING:
    from headrace.device.encoder import TorchEncoder
    from headrace.device.executor import ModelExecutor

_OOM_SCORE = "500"  # the kernel takes this process before the one that serves, when memory runs out


@dataclass(frozen=True, slots=True)
class Held:
    """What was loaded."""

    executor: ModelExecutor
    facts: LoadFacts
    encoder: TorchEncoder | None = None


Loader = Callable[[wire.Load, Callable[[str], None], Callable[[ModelFacts], None]], Held]


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


def main(end: socket.socket, load: Loader) -> int:
    """Serve one parent until it goes. Returns the exit status."""
    _stand_back()
    channel = Channel(end)
    threading.Thread(target=_live, args=(channel,), name="headrace-alive", daemon=True).start()
    with contextlib.suppress(OSError):  # the parent has gone, so nobody is left to answer
        first = channel.receive()
        if not isinstance(first, wire.Load):
            return 1
        held = _loaded(first, load, channel)
        if held is not None:
            _Server(held, channel).serve()
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


def _loaded(what: wire.Load, load: Loader, channel: Channel) -> Held | None:
    try:
        held = load(what, lambda phase: channel.send(wire.Phase(phase)), lambda facts: channel.send(wire.Opened(facts)))
    except HeadraceError as error:
        channel.send(wire.Refused(str(error)))
        return None
    except OSError as error:
        channel.send(wire.Refused(f"the model cannot be read: {error}"))
        return None
    except Exception as error:
        traceback.print_exc()
        channel.send(wire.Refused(f"loading the model failed unexpectedly, see the lines above: {_told(error)}"))
        return None
    channel.send(wire.Loaded(held.facts))
    return held


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
        try:
            if self._held.encoder is None:
                raise RuntimeError("there is no embedding model here")
            answer: wire.FromChild = wire.Encoded(message.number, self._held.encoder.step(message.sequences))
        except Exception as error:
            answer = wire.Failed(message.number, _told(error), encoding=True)
        self._channel.send(answer)


async def _run(executor: Executor, plan: StepPlan) -> StepResult:
    return await executor.run(plan)


def encoder_facts(encoder: TorchEncoder, tokenizer_json: str) -> EncoderFacts:
    return EncoderFacts(encoder.encoding, tokenizer_json, encoder.model.nbytes)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def from_argument(text: str) -> socket.socket:
    """The socket that was inherited under this number."""
    if not text.isdecimal():
        sys.exit("this is started by headrace serve, not by hand")
    return socket.socket(fileno=int(text))
