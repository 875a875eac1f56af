"""Batches texts of concurrent requests for an encoder: the oldest that waits sets the length, and those as long or a
little shorter ride along, so that little is padding. Owns the queue, bounded in tokens; computes nothing.

    embed -> queue ---.    waiting: 7 (oldest) 3 9 6 7      batch: 7 7 6, padded to 7
                      '--> run: one batch at a time --> futures of those who wait
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.core import clock
from headrace.core.ports import Encoder, Encoding
from headrace.core.types import HeadraceError, Unavailable
from headrace.engine.queue import Bounds

BATCH_TOKENS = 1024  # of one batch, padding included: about a tenth of a second on two cores
_WINDOW = 256  # how many of those who wait are looked at for one batch
_ANY = 1 << 62  # texts: their tokens are what counts


@dataclass(slots=True, eq=False)
class _Waiting:
    ids: Sequence[int]
    vector: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class EncodingFailed(HeadraceError):
    """The encoder failed on a batch; the message is for the log."""


class Batcher:
    """An `Embedder` in front of one encoder. Whoever makes it runs `run()` as a task for as long as it should serve."""

    def __init__(self, encoder: Encoder, max_waiting_tokens: int, batch_tokens: int = BATCH_TOKENS) -> None:
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._bounds = Bounds(_ANY, max_waiting_tokens)
        self._waiting: list[_Waiting] = []  # in order of arrival
        self._work = asyncio.Event()
        self._stopped = False
        self.batches = 0

    @property
    def encoding(self) -> Encoding:
        return self._encoder.encoding

    @property
    def waiting_tokens(self) -> int:
        return sum(len(one.ids) for one in self._waiting)

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """See `core.ports.Embedder`. A caller who goes away takes along what has not begun."""
        if self._stopped:
            raise Unavailable("the embedding model has stopped")
        self._bounds.check_room(sum(map(len, sequences)), len(self._waiting), self.waiting_tokens, clock.now())
        mine = [_Waiting(ids) for ids in sequences]
        self._waiting += mine
        self._work.set()
        try:
            return [await one.vector for one in mine]
        finally:
            for one in mine:
                if one.vector.done() and not one.vector.cancelled():
                    one.vector.exception()  # asyncio complains of failures that nobody has looked at
                one.vector.cancel()

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            while True:
                batch = self._next()
                if batch:
                    await self._serve(batch)
                else:
                    self._work.clear()
                    await self._work.wait()
        finally:
            self._stopped = True
            for one in self._waiting:
                _settle(one, Unavailable("the embedding model has stopped"))

    def _next(self) -> list[_Waiting]:
        self._waiting = [one for one in self._waiting if not one.vector.done()]
        taken = form([len(one.ids) for one in self._waiting[:_WINDOW]], self._batch_tokens)
        batch = [self._waiting[at] for at in taken]
        chosen = set(taken)
        self._waiting = [one for at, one in enumerate(self._waiting) if at not in chosen]
        for one in batch:
            self._bounds.left(len(one.ids), clock.now())
        return batch

    async def _serve(self, batch: Sequence[_Waiting]) -> None:
        self.batches += 1
        try:
            vectors = await self._encoder.encode([one.ids for one in batch])
        except Exception as error:  # whoever is in this batch must learn of it, and the others go on
            for one in batch:
                _settle(one, EncodingFailed(f"the encoder failed: {type(error).__name__}: {error}"))
            return
        for one, vector in zip(batch, vectors, strict=True):
            if not one.vector.done():
                one.vector.set_result(vector)


def form(lengths: Sequence[int], batch_tokens: int) -> list[int]:
    """Which of those who wait, oldest first, make the next batch: the oldest, and then the longest of those that are
    not longer, as many as fit when all are padded to the oldest's length."""
    if not lengths:
        return []
    most = max(1, batch_tokens // max(1, lengths[0]))
    riders = sorted((at for at in range(1, len(lengths)) if lengths[at] <= lengths[0]), key=lambda at: -lengths[at])
    return [0, *riders[: most - 1]]


def _settle(one: _Waiting, error: HeadraceError) -> None:
    if not one.vector.done():
        one.vector.set_exception(error)
