"""The course of one simulation whose requests are all known before: they arrive in time, other things happen later, and
it is over when the last request is, or something goes wrong. What `sim.handoff`, `sim.power` and `sim.elastic` share;
traffic that answers to what it gets is `sim.feed`. Owns the count of open requests and the first error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from headrace.core import clock
from headrace.core.types import InvalidRequest, Overloaded, RequestId
from headrace.sim.run import Replica, Site
from headrace.workload.arrival import Arrival, Traffic, traffic


class Course:
    """`begin` it, `close` every request once, and wait until it is `over`."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self.lengths: dict[RequestId, int] = {}  # output tokens of requests that were sent and have not ended
        self._arrivals = arrivals
        self._open = len(arrivals)
        self._done = asyncio.Event()
        self._error: Exception | None = None

    @property
    def going(self) -> bool:
        return self._open > 0

    def begin(self, arrive: Callable[[int], None]) -> None:
        """From now on `arrive` hears the number of each arrival when it is due."""
        self._arrive = arrive
        if self._arrivals:
            self.at(self._arrivals[0].at_s or 0.0, self._arrived, 0)
        else:
            self._done.set()

    def _arrived(self, number: int) -> None:
        if number + 1 < len(self._arrivals):
            self.at(self._arrivals[number + 1].at_s or 0.0, self._arrived, number + 1)
        self._arrive(number)

    def at(self, when_s: float, call: Callable[..., None], *args: object) -> None:
        asyncio.get_running_loop().call_at(when_s, self._guarded, call, *args)

    def soon(self, call: Callable[..., None], *args: object) -> None:
        asyncio.get_running_loop().call_soon(self._guarded, call, *args)

    def _guarded(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception as error:
            self.stop(error)

    def send(self, replica: Replica, sent: Traffic) -> bool:
        """Whether the replica took it."""
        name = sent.request.id
        self.lengths[name] = sent.output_tokens
        try:
            replica.engine.submit(sent.request)
        except (InvalidRequest, Overloaded):
            del self.lengths[name]
            return False
        return True

    def close(self) -> None:
        """One request is over."""
        self._open -= 1
        if not self._open:
            self._done.set()

    def stop(self, error: Exception) -> None:
        """Something is wrong, and the first that is ends the simulation."""
        self._error = self._error or error
        self._done.set()

    async def over(self) -> None:
        await self._done.wait()

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error


def request(arrival: Arrival, name: RequestId, site: Site) -> Traffic:
    """As it comes to an engine now."""
    size, most = site.capacity.block_tokens, site.max_new_tokens
    return traffic(arrival, name, now_s=clock.now(), block_tokens=size, max_new_tokens=most)


async def stopped(serving: Sequence[asyncio.Task[None]]) -> None:
    """Replicas stop a second later: until then their executors hear whom to forget."""
    await clock.sleep(1.0)
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)
