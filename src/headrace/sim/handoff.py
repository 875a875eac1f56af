"""Simulates replicas that only compute prompts beside replicas that only decode. `cluster.roles` decides who computes
what and when KV moves; here it happens, on a link that takes its time.

    arrivals --> door --> prefill replica --first token--> KV waits there --pull--> decode replica --last token-->
                  ^          one token each     |           bytes / bandwidth          its prompt is there already
                  '------ no room -------------'            one pull after the other
                                                            into every decode replica

Owns which KV lies where: a prefill replica's from the moment a prompt was sent to it until its KV was pulled, a decode
replica's from the moment it accepted a request until that runs there. Requests and their blocks are the engines'.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from headrace.cluster.roles import accepts, decode_of, prefill_of
from headrace.cluster.view import ReplicaView
from headrace.core import clock
from headrace.core.events import Admitted, Decoded, Drew, Event, Finished, Preempted
from headrace.core.types import RequestId
from headrace.sim.cost.batch import Batch, CostModel, Line, Spans, StepCost
from headrace.sim.course import Course, request, stopped
from headrace.sim.gaps import Gaps
from headrace.sim.hardware import Link
from headrace.sim.run import Replica, Site, seldom_collected, simulate
from headrace.sim.stats import COMPLETED
from headrace.workload.arrival import Arrival, Stretch


@dataclass(frozen=True, slots=True)
class Life:
    """One request: seconds to its first token, per later token on average, and its longest pause."""

    ttft_s: float
    tpot_s: float
    longest_s: float
    later: int = 0  # tokens after the first


@dataclass(frozen=True, slots=True)
class Apart:
    """Replicas of two roles, as many as each site says, and the way between them."""

    prefill: Site
    decode: Site
    link: Link  # into a decode replica
    kv_bytes_per_token: float  # that cross it

    def __post_init__(self) -> None:
        mixed = replace(self.decode.settings, batch="chunked", prefix_cache=False)  # who is pulled joins who decodes
        there = replace(self.decode, settings=mixed, cost=Pulled(self.decode.cost), token_budget=1 << 40)
        object.__setattr__(self, "decode", there)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A price by which prompts are there already: their rows are decode rows of the same context."""

    cost: CostModel

    def estimate(self, batch: Batch) -> StepCost:
        return self.cost.estimate(self._of(batch))

    def line(self, batch: Batch, steps: int) -> Line:
        return self.cost.line(self._of(batch), steps)

    @staticmethod
    def _of(batch: Batch) -> Batch:
        if not batch.prefill_tokens:
            return batch
        rows = batch.rows
        full, *windowed = (
            Spans(0, 0, span.decode_context + span.prefill_context, growing=rows)
            for span in (batch.full, *batch.windowed)
        )
        return Batch(rows, rows, batch.sampled, rows, 0, full, tuple(windowed), batch.longest)


class Hears(Protocol):
    """Who wants to know of requests."""

    def admitted(self, event: Admitted) -> None: ...

    def finished(self, event: Finished, longest_s: float) -> None:
        """`longest_s` is its longest pause between tokens."""
        ...


class Ear:
    """An `Observer` of one replica, as pauses are between the tokens of one."""

    def __init__(self, of: Hears) -> None:
        self._of = of
        self._gaps = Gaps()

    def observe(self, event: Event) -> None:
        if isinstance(event, Decoded):
            self._gaps.decoded(event)
        elif isinstance(event, Drew):
            self._gaps.drew(event)
        elif isinstance(event, Preempted):
            self._gaps.preempted(event.request_id)
        elif isinstance(event, Admitted):
            self._of.admitted(event)
        elif isinstance(event, Finished):
            self._of.finished(event, self._gaps.finished(event.request_id) or 0.0)


def lives_apart(arrivals: Sequence[Arrival], apart: Apart) -> list[Life]:
    """Lives of the requests that were answered, in the order of their ends. Raises what a cost model raises."""
    with seldom_collected():
        return clock.run(Handoff(arrivals, apart).run(), virtual=True)


def lives_together(arrivals: Sequence[Arrival], site: Site) -> list[Life]:
    """Lives on one replica that does both."""
    watch = _Together()
    simulate(arrivals, replace(site, replicas=1), observer=Ear(watch))
    return watch.lives


class _Together:
    def __init__(self) -> None:
        self.lives: list[Life] = []

    def admitted(self, event: Admitted) -> None:
        pass

    def finished(self, event: Finished, longest_s: float) -> None:
        if event.reason in COMPLETED and event.first_token_s is not None:
            later = event.usage.output_tokens - 1
            each_s = (event.at_s - event.first_token_s) / max(later, 1)
            self.lives.append(Life(event.first_token_s - event.arrival_s, each_s, longest_s, later))


class Handoff:
    """One run. Requests are called by a letter, p or d, and their number."""

    def __init__(self, arrivals: Sequence[Arrival], apart: Apart) -> None:
        self._course = Course(arrivals)
        self.lengths = self._course.lengths
        self.lives: list[Life] = []
        self.most_held = 0  # blocks of KV that lay on one prefill replica at most
        self._arrivals, self._apart = arrivals, apart
        self._prefill = [Replica(at, apart.prefill, self, Ear(self)) for at in range(apart.prefill.replicas)]
        self._decode = [Replica(at, apart.decode, self, Ear(self)) for at in range(apart.decode.replicas)]
        self._held = [0] * len(self._prefill)
        self._promised = [0] * len(self._decode)
        self._coming = [0] * len(self._decode)  # requests whose KV is on its way
        self._free_s = [0.0] * len(self._decode)  # when the link into a replica is free
        self._door: deque[int] = deque()  # arrivals that no prefill replica has room for
        self._offers: deque[int] = deque()  # whose KV nobody has pulled
        self._at: dict[int, int] = {}  # where it is, of a prompt and later of an answer
        self._first_s: dict[int, float] = {}

    async def run(self) -> list[Life]:
        serving = [asyncio.create_task(one.engine.run()) for one in (*self._prefill, *self._decode)]
        self._course.begin(self._arrive)
        await self._course.over()
        await stopped(serving)
        self._course.check()
        return self.lives

    # -- what replicas tell --------------------------------------------------------------------------------------------

    def admitted(self, event: Admitted) -> None:
        number = int(event.request_id[1:])
        if event.request_id[0] == "d" and not event.again:
            self._promised[self._at[number]] -= self._blocks(number)

    def finished(self, event: Finished, longest_s: float) -> None:
        self._course.soon(self._finished, event, longest_s)

    def ended(self, request_id: RequestId) -> None:
        del self.lengths[request_id]

    def stop(self, error: Exception) -> None:
        self._course.stop(error)

    def _finished(self, event: Finished, longest_s: float) -> None:
        number, arrival = int(event.request_id[1:]), self._arrivals[int(event.request_id[1:])]
        fine = event.reason in COMPLETED and event.first_token_s is not None
        if event.request_id[0] == "p":
            if fine and arrival.output_tokens > 1 and self._blocks(number) <= self._apart.decode.capacity.blocks:
                self._first_s[number] = event.at_s
                self._offers.append(number)
            else:
                self._release(number)
                self._close(Life(event.at_s - (arrival.at_s or 0.0), 0.0, 0.0) if fine else None)
        else:
            self._close(self._life(number, event, longest_s) if fine else None)
        self._settle()

    def _life(self, number: int, event: Finished, longest_s: float) -> Life:
        arrival, first_s = self._arrivals[number], self._first_s.pop(number)
        second_s = event.first_token_s or event.at_s
        later = arrival.output_tokens - 1
        each_s = (event.at_s - first_s) / later
        return Life(first_s - (arrival.at_s or 0.0), each_s, max(second_s - first_s, longest_s), later)

    # -- who goes where ------------------------------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        self._door.append(number)
        self._settle()

    def _settle(self) -> None:
        """Pull and send as much as may be, each in its order."""
        while self._offers:
            blocks, to = self._blocks(self._offers[0]), decode_of(self._decode_views())
            if not accepts(self._decode_views()[to], blocks):
                break
            self._pull(self._offers.popleft(), to, blocks)
        while self._door:
            blocks = self._blocks(self._door[0])
            at = prefill_of(self._prefill_views(), min(blocks, self._apart.prefill.capacity.blocks))
            if at is None:
                break
            self._compute(self._door.popleft(), at, blocks)

    def _prefill_views(self) -> list[ReplicaView]:
        views = [one.view() for one in self._prefill]
        return [
            replace(view, role="prefill", free_blocks=view.blocks - held)
            for view, held in zip(views, self._held, strict=True)
        ]

    def _decode_views(self) -> list[ReplicaView]:
        more = zip((one.view() for one in self._decode), self._promised, self._coming, strict=True)
        return [
            replace(
                view,
                role="decode",
                requests=view.requests + coming,
                free_blocks=view.free_blocks - promised,
                offered_blocks=promised,
            )
            for view, promised, coming in more
        ]

    def _compute(self, number: int, at: int, blocks: int) -> None:
        self._at[number] = at
        self._held[at] += blocks
        self.most_held = max(self.most_held, self._held[at])
        arrival = replace(self._arrivals[number], output_tokens=1, max_new_tokens=1)
        if not self._course.send(self._prefill[at], request(arrival, f"p{number}", self._apart.prefill)):
            self._release(number)
            self._close(None)

    def _pull(self, number: int, to: int, blocks: int) -> None:
        """The link into a replica carries one request's KV after the other's."""
        self._promised[to] += blocks
        self._coming[to] += 1
        nbytes = self._apart.kv_bytes_per_token * self._arrivals[number].prompt_tokens
        self._free_s[to] = max(clock.now(), self._free_s[to]) + nbytes / self._apart.link.bytes_per_s
        there_s = self._free_s[to] + self._apart.link.latency_s
        self._course.at(there_s, self._pulled, number, to, blocks)

    def _pulled(self, number: int, to: int, blocks: int) -> None:
        self._release(number)
        self._at[number] = to
        self._coming[to] -= 1
        if not self._course.send(self._decode[to], request(self._continued(number), f"d{number}", self._apart.decode)):
            self._promised[to] -= blocks
            self._close(None)
        self._settle()

    def _continued(self, number: int) -> Arrival:
        """The same request with its first token in the prompt."""
        arrival = self._arrivals[number]
        tokens = arrival.output_tokens - 1
        prompt = (Stretch(arrival.prompt_tokens + 1),)
        return replace(arrival, prompt=prompt, output_tokens=tokens, max_new_tokens=tokens)

    # -- books ---------------------------------------------------------------------------------------------------------

    def _blocks(self, number: int) -> int:
        return -(-(self._arrivals[number].prompt_tokens + 1) // self._apart.prefill.capacity.block_tokens)

    def _release(self, number: int) -> None:
        self._held[self._at.pop(number)] -= self._blocks(number)

    def _close(self, life: Life | None) -> None:
        if life is not None:
            self.lives.append(life)
        self._course.close()

    def check(self) -> None:
        """Nothing is held, promised or under way when all is over. Raises AssertionError."""
        assert not any((*self._held, *self._promised, *self._coming)), "KV was lost"
        assert not self._door and not self._offers and not self.lengths
