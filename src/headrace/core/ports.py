"""The joints: what one room may ask of another, in at most five methods each. Implementations live elsewhere."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.core.events import Event
from headrace.core.step import Run, StepPlan, StepResult
from headrace.core.types import FinishReason, HeadraceError, Output, Request, RequestId


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an executor can hold. The scheduler plans within it."""

    blocks: int  # KV blocks on the device
    block_tokens: int
    max_context_tokens: int  # prompt plus output of one request: the model's limit or what fits, the smaller
    vocab: int
    steps: int = 1  # how often it may repeat the beat of one plan
    layers: int = 1  # of the model, where a plan may send work through some of them only; 1: all of them at once
    host_blocks: int = 0  # KV blocks in the host's memory, which plans copy to and from; 0: no such tier
    least_copied_blocks: int = 1  # of one request: fewer are quicker to compute again than to copy


def least_copied_blocks(copies_s: float, copied_s: float, computed_s: float) -> int:
    """The fewest blocks that are quicker to copy, in `copies_s` and `copied_s` more for each, than to compute in
    `computed_s` each. Where computing is always quicker, more blocks than there are anywhere."""
    gain_s = computed_s - copied_s
    return max(1, int(copies_s / gain_s) + 1) if gain_s > 0 else 1 << 40


class Executor(Protocol):
    """Performs plans, one after the other, in the order given. Plans of several lanes may be under way at once, one of
    each lane: what they admit and release counts from the call of `run` on, and none of them names a request or
    writes a block that another under way computes."""

    @property
    def capacity(self) -> Capacity: ...

    async def run(self, plan: StepPlan) -> StepResult:
        """Perform one step. Raises if the step failed as a whole; the executor has then forgotten all its requests, but
        those whose step is under way in another lane. Raises ExecutorLost if the executor itself is gone."""
        ...

    def interrupt(self) -> Run | None:
        """Something happens that the plan did not foresee: return from `run` after the repetition in progress. Tells
        which repetitions were over before it and are not to be reported again; None if there were none."""
        ...

    async def close(self) -> None: ...


class ExecutorLost(HeadraceError):
    """The executor is gone, with all KV and everybody it knew; every step under way in any lane is told the same. It
    answers nothing until `again` has returned."""

    def __init__(self, message: str, again: Callable[[float], Awaitable[None]], begun: bool = True) -> None:
        """`again(delay_s)` starts it anew after so many seconds; raises HeadraceError if that fails, and may then be
        tried once more. `begun`: it may have been the step that was too much for it; False, if it was gone before."""
        super().__init__(message)
        self.again = again
        self.begun = begun


@dataclass(frozen=True, slots=True)
class Status:
    """A snapshot of one service for health pages, clients and policies."""

    model: str
    state: str  # "ready", "stalled", "restarting", "draining" or "failed"
    capacity: Capacity
    running: int
    waiting: int
    waiting_tokens: int
    used_blocks: int
    steps: int
    last_progress_s: float  # clock time of the last finished step, or of start
    error: str | None = None  # why it is neither ready nor draining
    restarts: int = 0  # of the executor
    violations: int = 0  # of the scheduler's invariants, found at idle
    cached_blocks: int = 0  # used by nobody, with KV worth finding


class Service(Protocol):
    """Takes requests and streams their outputs. The gateway holds one and sees nothing deeper."""

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Outputs of one request, the last one with `finish`. Raises InvalidRequest, Overloaded or Unavailable before
        the first output. Closing the iterator early aborts the request before the next step is planned."""
        ...

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; its stream gets `reason` (STOP where a stop string was seen). Unknown ids are ignored."""
        ...

    def status(self) -> Status: ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, finish the others. True if all finished in time; the rest are aborted."""
        ...


@dataclass(frozen=True, slots=True)
class Residency:
    """Whether a model is in memory, and for how long."""

    state: str = "ready"  # or "cold", "loading", "yielding" (to another model, when its requests are over), "unloading"
    share: float = 1.0  # of the load that is under way, 0 to 1
    memory_bytes: int = 0  # weights, activations and KV; of a cold model, KV that is kept for the next time
    leaves_s: float = math.inf  # clock time at which it goes if nobody uses it
    error: str | None = None  # why the last load failed


class Resident(Protocol):
    """A model that may be in memory or not. A request for it loads it; this is for those who want just that."""

    def residency(self) -> Residency: ...

    async def load(self) -> None:
        """Return when it is in memory. Raises Overloaded or Unavailable."""
        ...

    def keep(self, seconds: float) -> None:
        """From now on it stays in memory for so long when nobody uses it; 0 is for once: it goes as soon as its
        requests are over."""
        ...


class Observer(Protocol):
    def observe(self, event: Event) -> None:
        """Called synchronously, in order, on the loop's thread; must be fast and must not raise."""
        ...


@dataclass(frozen=True, slots=True)
class Encoding:
    """What an embedding model takes and gives."""

    model: str
    dimensions: int  # of a vector
    max_tokens: int  # of one text, with the marks around it
    vocab: int
    family: str  # bert, qwen3, ...


class Encoder(Protocol):
    """Turns token ids into vectors, one batch at a time."""

    @property
    def encoding(self) -> Encoding: ...

    async def encode(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """A unit vector of `dimensions` float32, little-endian, per sequence. Raises if the batch failed as a whole."""
        ...


class Embedder(Protocol):
    """As an encoder, for many callers at once. The gateway holds one."""

    @property
    def encoding(self) -> Encoding: ...

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """A vector per sequence. Raises Overloaded or Unavailable, and HeadraceError if the encoder failed."""
        ...
