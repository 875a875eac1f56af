"""What the tests of the engine share: requests out of numbers, a recording observer, and a rig that steps a scheduler
against the strict executor and checks every invariant after every event."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from null_executor import VOCAB, NullExecutor, reference, seer

from headrace.core.config import EngineSettings
from headrace.core.events import Event
from headrace.core.keys import block_keys
from headrace.core.ports import Capacity, Observer
from headrace.core.step import StepPlan
from headrace.core.types import FinishReason, Output, Request, RequestId, Sampling, Tokens
from headrace.engine.policies.lanes import Measured
from headrace.engine.policy import Always, BatchView, Share, choose
from headrace.engine.scheduler import Scheduler


def newest_first(batch: BatchView) -> Generator[Share, int, None]:
    """A batch policy of a third party: newcomers overtake, so a prefill may find that others did its work."""
    left = batch.token_budget
    left -= yield Share(batch.decoding, len(batch.decoding))
    left -= yield Share(batch.waiting, left)
    yield Share(batch.prefilling[::-1], left)


PRICE = (0.01, 0.001)  # seconds of a step, and of each token of it, as measured before


class Recorder:
    """Keeps every event, and passes it on if somebody listens."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.then: Observer | None = None

    def observe(self, event: Event) -> None:
        self.events.append(event)
        if self.then is not None:
            self.then.observe(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def make_request(
    name: str, prompt: Sequence[int], max_new_tokens: int = 4, block_tokens: int = 4, **more: Any
) -> Request:
    more.setdefault("block_keys", block_keys(prompt, block_tokens, more.get("salt", b"")))
    if "prompt_logprobs" in more:
        more["sampling"] = Sampling(prompt_logprobs=more.pop("prompt_logprobs"))
    return Request(name, (Tokens(tuple(prompt)),), more.pop("arrival_s", 0.0), max_new_tokens, **more)


class Rig:
    """A scheduler, the strict executor, and everything that came out."""

    def __init__(
        self,
        blocks: int = 64,
        budget: int = 32,
        *,
        block_tokens: int = 4,
        context: int = 64,
        layers: int = 1,
        host_blocks: int = 0,
        least_copied_blocks: int = 1,
        drafts: int = 0,  # at most so many, of a `seer`
        follows: bool = False,  # the token budget follows the steps, all of which take as long
        **more: Any,
    ) -> None:
        context = min(context, blocks * block_tokens)
        tiers = {"host_blocks": host_blocks, "least_copied_blocks": least_copied_blocks}
        self.capacity = Capacity(blocks, block_tokens, context, vocab=VOCAB, layers=layers, **tiers)
        policies = {name: more.pop(name) for name in list(more) if callable(more[name])}
        settings = EngineSettings(block_tokens=block_tokens, **more)
        if drafts:
            policies |= {"drafter": seer, "controller": Always(EngineSettings(draft_tokens=drafts))}
        self.recorder = Recorder()
        self.scheduler = Scheduler(
            settings,
            self.capacity,
            token_budget=budget,
            observer=self.recorder,
            policies=replace(choose(settings, predict=Measured(*PRICE), step_s=PRICE if follows else None), **policies),
        )
        self.executor = NullExecutor(self.capacity)
        self.now = 0.0
        self.requests: dict[RequestId, Request] = {}
        self.outputs: dict[RequestId, list[Output]] = {}
        self.plans: list[StepPlan] = []
        self.flights: dict[int, StepPlan] = {}  # of several lanes
        self.turns = random.Random(blocks)  # whose it is

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request, self.now)
            self.requests[request.id] = request
            self.outputs[request.id] = []
            self.scheduler.check()

    def collect(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            so_far = self.outputs[output.request_id]
            assert not so_far or so_far[-1].finish is None, "an output after the finish"
            so_far.append(output)
        self.scheduler.check()

    def abort(self, name: RequestId) -> None:
        output = self.scheduler.abort(name, self.now)
        self.collect([output] if output else [])

    def step(self, *, fails: bool = False, abort_in_flight: RequestId | None = None) -> StepPlan | None:
        """One round of the loop; returns the plan. With two lanes, a step begins or ends in one of them."""
        self.now += 1.0
        self.collect(self.scheduler.expire(self.now))
        if self.scheduler.lanes > 1:
            plan = self._turn(self.turns.randrange(2), fails)
            if plan is not None and abort_in_flight is not None:
                self.abort(abort_in_flight)
            return plan
        plan = self.scheduler.plan(self.now)
        self.scheduler.check()
        if plan is None:
            return None
        self.plans.append(plan)
        result = self.executor.perform(plan)
        if abort_in_flight is not None:
            self.abort(abort_in_flight)
        self.now += 1.0
        if fails:
            self.executor.spoil(plan)
            self.collect(self.scheduler.fail(self.now, "on purpose"))
        else:
            self.collect(self.scheduler.commit(result, self.now))
        return plan

    def _turn(self, first: int, fails: bool) -> StepPlan | None:
        for lane in (first, 1 - first):
            if lane in self.flights:
                return self.end(lane, fails)
            if (plan := self.begin(lane)) is not None:
                return plan
        return None

    def begin(self, lane: int) -> StepPlan | None:
        """A lane plans, if it has something to do."""
        plan = self.scheduler.plan(self.now, lane)
        self.scheduler.check()
        if plan is not None:
            assert plan.lane == lane
            assert all(0.0 < one.share <= 1.0 for one in plan.lanes)
            self.plans.append(plan)
            self.flights[lane] = plan
            self.executor.begin(plan)
        return plan

    def end(self, lane: int, fails: bool = False) -> StepPlan:
        plan = self.flights.pop(lane)
        result = self.executor.end(plan)
        if fails:
            self.executor.spoil(plan)
            self.collect(self.scheduler.fail(self.now, "on purpose", lane))
        else:
            self.collect(self.scheduler.commit(result, self.now))
        return plan

    def drain(self, most_steps: int = 5000) -> None:
        """Step until idle, then check that nothing is left anywhere and every output is right."""
        for _ in range(most_steps):
            if self.step() is None:
                break
        else:
            raise AssertionError("livelock: still busy after so many steps")
        assert self.scheduler.live == self.scheduler.used_blocks == self.scheduler.waiting_tokens == 0
        assert not self.executor.known, "the executor was not told to forget everybody"
        for name in self.requests:
            self.check_outputs(name)

    def tokens(self, name: RequestId) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]

    def finish(self, name: RequestId) -> FinishReason | None:
        return self.outputs[name][-1].finish if self.outputs[name] else None

    def check_outputs(self, name: RequestId) -> None:
        """Exactly one finish, and the tokens are those the request would get alone, or the first of them."""
        outputs, expected = self.outputs[name], reference(self.requests[name], self.capacity)
        assert [output.finish is not None for output in outputs].count(True) == 1
        assert outputs[-1].finish is not None and outputs[-1].usage is not None
        tokens = self.tokens(name)
        assert tokens == expected[: len(tokens)]
        assert outputs[-1].usage.output_tokens == len(tokens)
        if outputs[-1].finish in (FinishReason.STOP, FinishReason.LENGTH):
            assert tokens == expected
            stopped = tokens[-1] in self.requests[name].stop_token_ids
            assert outputs[-1].finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)
