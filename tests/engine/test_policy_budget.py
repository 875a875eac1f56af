"""The token budget that follows measured steps: what fits and what it is worth, on devices that are not as they were
when the model was loaded, that read context, that others slow down, and that are held up now and then."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from engine_rig import Recorder
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import EngineSettings
from headrace.core.events import StepDone
from headrace.core.ports import Capacity
from headrace.core.step import Beat, Decode, Run, Sampled, StepPlan, StepResult, Work
from headrace.core.types import Blank, Request
from headrace.engine.policies.budget import LEAST_TOKENS, StepBudget
from headrace.engine.policies.estimates import StepTime
from headrace.engine.policy import BATCHES, MOST_STEP_TOKENS, choose, token_budget
from headrace.engine.scheduler import Scheduler

TARGET_S = 0.3
LOADED = (0.0034, 0.0009)  # as measured where contexts are short


def pairs(work: Work) -> int:
    return work.tokens * work.start + work.tokens * (work.tokens + 1) // 2


@dataclass
class Machine:
    """A replica on a device with a law of its own, in virtual time."""

    base_s: float = LOADED[0]
    token_s: float = LOADED[1]
    context_s: float = LOADED[1] / 1800
    slower: Callable[[int], float] = lambda step: 1.0  # by this factor
    batch: str = "chunked"
    layers: int = 1
    price: tuple[float, float] = LOADED
    now: float = 0.0
    steps: list[tuple[StepPlan, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = EngineSettings(inter_token_ms=1e3 * TARGET_S, batch=self.batch)
        self.capacity = Capacity(2048, 16, 16384, 50, layers=self.layers)
        policies = choose(given, step_s=self.price)
        first = token_budget(TARGET_S, *self.price)
        self.scheduler = Scheduler(given, self.capacity, token_budget=first, observer=Recorder(), policies=policies)
        self.numbers = iter(range(10**6))

    def ask(self, prompt: int, output: int) -> str:
        name = str(next(self.numbers))
        self.scheduler.add(Request(name, (Blank(prompt),), self.now, output), self.now)
        return name

    def seconds(self, plan: StepPlan) -> float:
        def share(work: Work) -> float:
            return (work.layers[1] - work.layers[0]) / self.layers if work.layers else 1.0

        tokens = sum(work.tokens * share(work) for work in plan.work)
        contexts = sum(pairs(work) * share(work) for work in plan.work)
        law_s = self.base_s + self.token_s * tokens + self.context_s * contexts
        return law_s * self.slower(len(self.steps))

    def step(self) -> float:
        plan = self.scheduler.plan(self.now)
        assert plan is not None
        seconds = self.seconds(plan)
        self.now += seconds
        drawn = {work.request_id: Sampled((1,)) for work in plan.work if work.sample}
        self.scheduler.commit(StepResult(plan.step, drawn), self.now)
        self.steps.append((plan, seconds))
        return seconds

    def prefill(self, prompt: int, most_steps: int = 2000) -> list[float]:
        """Durations of the steps with the prompt of somebody who comes now."""
        self.ask(prompt, 2)
        durations = []
        for _ in range(most_steps):
            durations.append(self.step())
            if not any(work.tokens > 1 for work in self.steps[-1][0].others):
                self.scheduler.check()
                return durations[:-1]
        raise AssertionError("the prompt does not end")

    def streams(self, count: int, steps: int = 20, prompt: int = 32) -> None:
        for _ in range(count):
            self.ask(prompt, 4000)
        for _ in range(steps):
            self.step()


def test_the_worst_step_of_an_intrusion_keeps_the_target() -> None:
    machine = Machine()
    machine.streams(4)
    first = machine.prefill(2048)
    assert max(first) <= 1.15 * TARGET_S, first  # nothing was known of context yet
    for prompt in (2048, 4096, 8192):
        durations = machine.prefill(prompt)
        assert max(durations) <= 1.15 * TARGET_S
        assert sorted(durations)[len(durations) // 2] >= 0.8 * TARGET_S, "steps are shorter than they need to be"


def test_without_it_the_target_is_missed_by_more_than_twice() -> None:
    """What this is for: the budget of the prices at load, on the same device."""
    machine = Machine()
    machine.scheduler = Scheduler(
        EngineSettings(), machine.capacity, token_budget=token_budget(TARGET_S, *LOADED), observer=Recorder()
    )
    machine.streams(4)
    assert max(machine.prefill(3072)) > 2 * TARGET_S


@pytest.mark.parametrize("batch", [name for name in BATCHES if name in ("chunked", "splitfuse", "filling", "layered")])
@pytest.mark.parametrize("context_s", [0.0, 5e-8, LOADED[1] / 1800, LOADED[1] / 300])
def test_every_chunking_former_keeps_it(batch: str, context_s: float) -> None:
    machine = Machine(batch=batch, context_s=context_s, layers=30)
    machine.streams(6)
    machine.prefill(1200)
    assert max(machine.prefill(1200)) <= 1.15 * TARGET_S


def test_a_machine_that_slows_down_is_followed_and_so_is_its_recovery() -> None:
    slow: list[float] = [1.0]
    machine = Machine(slower=lambda step: slow[0])
    machine.streams(4)
    machine.prefill(4096)
    for factor, within in ((3.0, 8), (1.0, 8), (1.5, 12)):
        slow[0] = factor
        durations = machine.prefill(6000)
        assert max(durations[within:]) <= 1.15 * TARGET_S, (factor, durations)
        assert max(durations) <= 1.25 * TARGET_S * max(1.0, factor)
        assert sum(durations[within:-1]) / len(durations[within:-1]) >= 0.75 * TARGET_S, (factor, durations)


def test_outliers_and_noise_leave_it_as_it_is() -> None:
    rng = random.Random(7)
    machine = Machine(slower=lambda step: 10.0 if step % 17 == 16 else rng.gauss(1.0, 0.05))
    machine.streams(4)
    machine.prefill(6000)
    durations = machine.prefill(8000)
    usual = sorted(durations)[: int(0.9 * len(durations))]
    assert max(usual) <= 1.3 * TARGET_S
    assert sum(usual) / len(usual) >= 0.75 * TARGET_S


def test_prompts_go_on_where_the_target_cannot_be_kept() -> None:
    """A device that misses the target with its decodes alone, and long contexts."""
    machine = Machine(base_s=0.5, token_s=0.05, price=(0.5, 0.05))
    machine.streams(4)
    machine.prefill(1000)
    chunks = [work.tokens for plan, _ in machine.steps for work in plan.others if work.tokens > 1]
    assert sum(chunks) >= 1000
    assert sorted(chunks)[len(chunks) // 10] >= LEAST_TOKENS


def test_many_who_decode_leave_room_for_a_prompt() -> None:
    machine = Machine()
    machine.streams(40, steps=400, prompt=200)
    machine.scheduler.token_budget = 1  # counts for nothing
    durations = machine.prefill(2000)
    assert max(durations) <= 1.15 * TARGET_S


def test_a_fixed_budget_stays_fixed() -> None:
    assert choose(EngineSettings(token_budget=100), step_s=LOADED).budget is None
    assert choose(EngineSettings(), step_s=None).budget is None
    lanes = EngineSettings(lanes="fixed")
    assert choose(lanes, step_s=LOADED).budget is None, "where lanes are two, nobody's next token waits for prompts"


# -- the price ---------------------------------------------------------------------------------------------------------


def taught(rng: random.Random) -> StepBudget:
    budget = StepBudget(TARGET_S, *LOADED, MOST_STEP_TOKENS)
    for step in range(rng.randrange(20)):
        work = Work("a", rng.randrange(4000), rng.randrange(1, 300), False)
        budget.planned(step, [work], None, 1)
        seconds = rng.uniform(0.0, 1.0)
        budget.observe(StepDone(0.0, step, seconds, work.tokens, Run(1, seconds), 1, 1.0))
    return budget


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 300),
    start=st.integers(0, 100_000),
    worth=st.integers(-50, 3000),
)
def test_what_fits_is_worth_no_more(seed: int, rows: int, start: int, worth: int) -> None:
    """Whatever steps took, and however little sense that makes."""
    budget = taught(random.Random(seed))
    context = 700 * rows
    whole = budget.begin(rows, context)
    assert whole >= budget.worth_of_decodes(rows, context) + LEAST_TOKENS
    tokens = budget.fitting(start, worth)
    assert max(0, min(worth, LEAST_TOKENS)) <= tokens <= max(0, worth)
    if tokens > 128:
        assert budget.worth(start, tokens) <= worth + 1
        assert budget.worth(start, tokens + 2) > worth
    assert budget.worth(start, tokens) >= tokens
    halves = budget.worth(start, tokens // 2) + budget.worth(start + tokens // 2, tokens - tokens // 2)
    assert halves == pytest.approx(budget.worth(start, tokens), abs=2)


def test_a_fresh_price_is_the_one_at_load() -> None:
    budget = StepBudget(TARGET_S, *LOADED, MOST_STEP_TOKENS)
    assert budget.begin(0, 0) == token_budget(TARGET_S, *LOADED)
    assert budget.fitting(0, 329) < 329  # a prompt reads itself
    assert StepBudget(TARGET_S, 0.0, 1e-6, MOST_STEP_TOKENS).begin(0, 0) == MOST_STEP_TOKENS
    assert StepBudget(TARGET_S, 0.0, 0.0, MOST_STEP_TOKENS).begin(0, 0) == MOST_STEP_TOKENS  # as a coarse clock has it


def test_only_steps_with_more_than_decodes_are_learnt_from() -> None:
    budget = StepBudget(TARGET_S, *LOADED, MOST_STEP_TOKENS)
    before = budget.begin(4, 400)
    beat = Beat(0, tuple(Decode(str(at), 100) for at in range(4)), 400, {})
    for step in range(50):
        budget.planned(step, (), beat, 1)
        budget.observe(StepDone(0.0, step, 5.0, 4, Run(1, 5.0), 1, 1.0))
    assert budget.begin(4, 400) == before
    budget.planned(50, [Work("a", 0, 16, False)], beat, 1)
    budget.observe(StepDone(0.0, 51, 5.0, 20, Run(1, 5.0), 1, 1.0))  # another step, after this one had failed
    assert budget.begin(4, 400) == before
    budget.planned(52, [Work("a", 0, 16, False)], beat, 1)
    budget.observe(StepDone(0.0, 52, 5.0, 20, Run(1, 5.0), 1, 1.0))
    assert budget.begin(4, 400) < before


def test_one_strange_step_is_an_outlier_and_three_are_a_change() -> None:
    time = StepTime(LOADED, 0.05)
    for at in range(40):
        time.learn(200 + at, 5000.0, False, 1e-3 * (200 + at))
    before = time.seconds(200, 5000, False)
    time.learn(200, 5000, False, 2.0)
    assert time.seconds(200, 5000, False) < 1.15 * before
    for _ in range(4):
        time.learn(200, 5000, False, 0.6)
    assert time.seconds(200, 5000, False) == pytest.approx(0.6, rel=0.1)
