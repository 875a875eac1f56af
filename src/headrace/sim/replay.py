"""Feeds a recording to a fresh scheduler under virtual time and compares every plan: the proof that what runs in the
simulator is what runs live. The same `Engine` loop drives it; only the clock and the executor are others.

The recording is a script. `_Player` is the executor: while a step runs it plays what fell into that step, and between
two steps it lets virtual time pass as the live host let it, so that every call reads the very time it read then.

    plan 7 | arrive b, abort a | done 7 | arrive c | plan 8 | ...
           '--- in `run` ------'        '- `_pause`'
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from headrace.core import clock
from headrace.core.events import Event
from headrace.core.ports import Capacity, ExecutorLost
from headrace.core.step import Sampled, StepPlan, StepResult
from headrace.engine.loop import Engine
from headrace.engine.policies.lanes import Measured, Predict
from headrace.engine.policy import choose
from headrace.engine.scheduler import Scheduler
from headrace.sim.recording import (
    Abort,
    Arrive,
    BadRecording,
    Content,
    Done,
    Entry,
    Failed,
    Head,
    Lost,
    Plan,
    Rested,
    describe,
    digest,
)

_MOST_TURNS = 20  # of the loop, until it has planned: an executor that starts again takes some

_ROWS = {  # of what the parts of a plan consist
    "work": ("row", "request, start, tokens, sample, new blocks, replaced blocks, layers, drafts"),
    "admitted": ("admission", "request, output, blocks, start"),
    "released": ("release", "request"),
    "copies": ("copy", "from, to, blocks"),
    "lanes": ("lane", "share, whether the step is its own"),
}


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found."""

    digests: tuple[str, ...]  # of the plans that agree, in order
    difference: str | None  # the first one, in words; None: every plan of the recording came out again


def check(entries: Iterable[Entry]) -> Replayed:
    """Play a recording. Raises BadRecording if it contradicts itself."""
    script = iter(entries)
    head = next(script, None)
    if not isinstance(head, Head):
        raise BadRecording("the recording does not begin with its head; record it again")
    if head.settings.lanes != "one":
        return _Direct(head).play(script)
    return clock.run(_play(head, script), virtual=True)


async def _play(head: Head, script: Iterator[Entry]) -> Replayed:
    player = _Player(head.capacity, script)
    scheduler = _scheduler(head)
    engine = Engine("replay", scheduler, player)
    player.begin(engine)
    serving = asyncio.create_task(engine.run(), name="replay")
    ended = asyncio.create_task(player.ended.wait())
    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, ended):
        task.cancel()
    await asyncio.gather(serving, ended, return_exceptions=True)
    if player.error is not None:
        raise player.error
    return Replayed(tuple(player.digests), player.difference)


def _scheduler(head: Head) -> Scheduler:
    """As it was when the recording began."""
    predict: Predict | None = Measured(*head.step_s) if head.step_s else None
    policies = choose(head.settings, predict=predict, step_s=head.step_s)
    budget = head.token_budget
    return Scheduler(head.settings, head.capacity, token_budget=budget, observer=_Deaf(), policies=policies)


class _Direct:
    """Lanes plan as others end and as requests come, which no loop in another time would do in just this order: the
    scheduler is told, call by call, what it was told then. Deadlines are among what it was told."""

    def __init__(self, head: Head) -> None:
        self._scheduler = _scheduler(head)
        self._lane: dict[int, int] = {}  # of each step
        self._digests: list[str] = []

    def play(self, script: Iterator[Entry]) -> Replayed:
        difference = next(filter(None, map(self._tell, script)), None)
        return Replayed(tuple(self._digests), difference)

    def _tell(self, entry: Entry) -> str | None:
        """Returns what is different."""
        scheduler = self._scheduler
        match entry:
            case Arrive():
                scheduler.add(entry.request(), entry.at_s)
            case Abort():
                scheduler.abort(entry.id, entry.at_s)
            case Done():
                drawn = {request_id: Sampled(tokens) for request_id, tokens in entry.drawn.items()}
                return self._answered(entry.step, lambda: scheduler.commit(StepResult(entry.step, drawn), entry.at_s))
            case Failed():
                lane = self._lane.get(entry.step, 0)
                return self._answered(entry.step, lambda: scheduler.fail(entry.at_s, entry.error, lane))
            case Lost():
                scheduler.lost(entry.at_s, entry.reason, entry.begun)
            case Plan() | Rested():
                return self._planned(entry)
        return None

    def _answered(self, step: int, tell: Callable[[], object]) -> str | None:
        if step not in self._lane:
            raise BadRecording(f"step {step} of the recording ends before it begins; record it again")
        tell()
        return None

    def _planned(self, entry: Plan | Rested) -> str | None:
        plan = self._scheduler.plan(entry.at_s, entry.lane)
        if plan is None:
            return None if isinstance(entry, Rested) else f"the replay finds nothing to do for step {entry.step}"
        content = describe(plan)
        if isinstance(entry, Rested):
            return f"the replay plans step {plan.step} where lane {entry.lane} rested"
        if (entry.step, entry.digest) != (plan.step, digest(content)):
            return explain(entry, plan.step, content)
        self._lane[plan.step] = entry.lane
        self._digests.append(entry.digest)
        return None


class _Deaf:
    """Nobody asks what happened."""

    def observe(self, event: Event) -> None:
        return


class _Player:
    """An `Executor` that answers from the script."""

    def __init__(self, capacity: Capacity, script: Iterator[Entry]) -> None:
        self._capacity = capacity
        self._script = script
        self._next: Entry | None = None
        self._planned = True  # the plan that the script expects was made
        self.digests: list[str] = []
        self.difference: str | None = None
        self.error: BadRecording | None = None
        self.ended = asyncio.Event()

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def begin(self, engine: Engine) -> None:
        self._engine = engine
        self._turn()
        asyncio.get_running_loop().call_soon(self._pause)

    async def run(self, plan: StepPlan) -> StepResult:
        expected, self._planned = self._next, True
        self._compare(expected, plan)
        if self.difference is not None:
            await self._stop()
        self._turn()
        while isinstance(self._next, Arrive | Abort):
            await clock.sleep_until(self._next.at_s)
            self._inject(self._next)
            self._turn()
        if self._next is None:
            await self._stop()
        end = self._next
        if not isinstance(end, Lost) and (not isinstance(end, Done | Failed) or end.step != plan.step):
            self.error = BadRecording(f"step {plan.step} of the recording has no end; record it again")
            await self._stop()
        assert isinstance(end, Done | Failed | Lost)
        await clock.sleep_until(end.at_s)
        self._turn()
        asyncio.get_running_loop().call_soon(self._pause)  # before the loop plans: it yields once, after committing
        if isinstance(end, Lost):
            raise _lost(end)
        if isinstance(end, Failed):
            raise RuntimeError(end.error)
        return StepResult(plan.step, {request_id: Sampled(drawn) for request_id, drawn in end.drawn.items()})

    def interrupt(self) -> None:
        """Its plans stand for one step each."""

    async def close(self) -> None:
        return

    def _pause(self) -> None:
        """Between two steps: what came in, and the time that the host took until it planned the next."""
        while isinstance(self._next, Arrive | Abort | Lost):
            clock.spend(self._next.at_s)
            self._inject(self._next)
            self._turn()
        if not isinstance(self._next, Plan):
            self.ended.set()
        else:
            clock.spend(self._next.at_s)
            self._planned = False
            asyncio.get_running_loop().call_later(0.0, self._missed, 0)

    def _missed(self, turns: int) -> None:
        """The loop had its turn at the time of the plan, and made none."""
        if not self._planned and turns < _MOST_TURNS:
            asyncio.get_running_loop().call_soon(self._missed, turns + 1)
        elif isinstance(self._next, Plan) and not self._planned:
            self.difference = f"the recording has a step {self._next.step} where the replay finds nothing to do"
            self.ended.set()

    def _turn(self) -> None:
        self._next = next(self._script, None)

    def _inject(self, entry: Arrive | Abort | Lost) -> None:
        if isinstance(entry, Arrive):
            self._engine.submit(entry.request())
        elif isinstance(entry, Lost):
            self._engine.lost(_lost(entry))
        else:
            self._engine.abort(entry.id)

    def _compare(self, expected: Entry | None, plan: StepPlan) -> None:
        content = describe(plan)
        found = digest(content)
        if not isinstance(expected, Plan):
            if expected is not None:
                self.difference = f"the replay plans step {plan.step} where the recording has none"
        elif (expected.step, expected.digest) != (plan.step, found):
            self.difference = explain(expected, plan.step, content)
        else:
            self.digests.append(found)

    async def _stop(self) -> None:
        self.ended.set()
        await asyncio.get_running_loop().create_future()


def _lost(entry: Lost) -> ExecutorLost:
    """An executor that starts again at once: when the next plan was made, the recording says."""

    async def again(delay_s: float) -> None:
        return

    return ExecutorLost(entry.reason, again, entry.begun)


def explain(expected: Plan, step: int, content: Content) -> str:
    """The first difference between a recorded plan and another, in words."""
    if expected.step != step:
        return f"the recording goes on with step {expected.step}, the replay with step {step}"
    if expected.content is None:
        return f"step {step} differs; the recording holds no contents to compare"
    here = msgspec.json.decode(msgspec.json.encode(content), type=Content)
    for part, (word, columns) in _ROWS.items():
        recorded, replayed = expected.content.get(part, []), here.get(part, [])
        for at in range(max(len(recorded), len(replayed))):
            rows = [str(rows[at]) if at < len(rows) else "nothing" for rows in (recorded, replayed)]
            if rows[0] != rows[1]:
                return f"step {step}, {word} {at} ({columns}): recorded {rows[0]}, replayed {rows[1]}"
    return f"step {step} has a digest that its recorded content does not have; the recording was changed"
