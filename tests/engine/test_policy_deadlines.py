"""Dispatching rules against the published numbers, and due dates through a whole scheduler."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from engine_rig import Rig, make_request
from policy_views import View

from headrace.core import events
from headrace.core.config import EngineSettings
from headrace.core.step import Run
from headrace.core.types import SLO
from headrace.engine.policies.deadlines import LONGEST_S, PATIENCE_S, Due, Job, Rule, due_s, eddc, mdd, mddc, slack

SIX = [Job(p, d) for p, d in zip([10, 11, 10, 10, 11, 10], [15, 11, 13, 11, 12, 11], strict=True)]


def edd(jobs: Sequence[Job], t: float) -> list[float]:
    return [due for _, due in jobs]


def spt(jobs: Sequence[Job], t: float) -> list[float]:
    return [service for service, _ in jobs]


def sequence(rule: Rule, jobs: Sequence[Job], shortest_breaks_ties: bool = False) -> list[int]:
    """What a machine that follows the rule does, one job after the other."""
    left, t, done = list(range(len(jobs))), 0.0, []
    if shortest_breaks_ties:
        left.sort(key=lambda at: jobs[at].service_s)
    while left:
        keys = rule([jobs[at] for at in left], t)
        chosen = left[keys.index(min(keys))]
        left.remove(chosen)
        done.append(chosen)
        t += jobs[chosen].service_s
    return done


def tardiness(jobs: Sequence[Job], order: Sequence[int]) -> float:
    ends = itertools.accumulate(jobs[at].service_s for at in order)
    return sum(max(0.0, end - jobs[at].due_s) for at, end in zip(order, ends, strict=True))


def test_the_six_jobs_of_the_paper() -> None:
    """arXiv:2510.24013: MDDC finds the optimum, 141, where MDD ends with 144 and EDD with 145."""
    assert sequence(mddc, SIX, shortest_breaks_ties=True) == [3, 0, 2, 5, 1, 4]
    assert tardiness(SIX, sequence(mddc, SIX, shortest_breaks_ties=True)) == 141
    assert sequence(mdd, SIX) == [1, 0, 2, 3, 5, 4]
    assert tardiness(SIX, sequence(mdd, SIX)) == 144
    assert tardiness(SIX, sorted(range(6), key=lambda at: (SIX[at].due_s, SIX[at].service_s))) == 145
    assert min(tardiness(SIX, order) for order in itertools.permutations(range(6))) == 141


def instances() -> list[list[Job]]:
    """400 of 100 jobs, by the generator of the paper: how tight and how spread dates are, over a grid."""
    rng, made = random.Random(0), []
    for tight, spread in itertools.product((0.2, 0.4, 0.6, 0.8), (0.2, 0.4, 0.6, 0.8, 1.0)):
        for _ in range(20):
            services = [rng.randint(1, 100) for _ in range(100)]
            low, high = (sum(services) * (1 - tight + sign * spread / 2) for sign in (-1, 1))
            made.append([Job(service, rng.uniform(low, high)) for service in services])
    return made


def test_mean_tardiness_over_the_grid_of_the_paper() -> None:
    mean = {mddc: 0.0, mdd: 0.0, spt: 0.0, edd: 0.0}
    for jobs in instances():
        for rule in (mddc, mdd, spt):
            mean[rule] += tardiness(jobs, sequence(rule, jobs, rule is mddc)) / 400
        mean[edd] += tardiness(jobs, sorted(range(100), key=lambda at: (jobs[at].due_s, jobs[at].service_s))) / 400
    assert [round(total) for total in mean.values()] == [35180, 35236, 52701, 56842]


def test_the_correction_of_edd_swaps_the_last_two() -> None:
    keys = eddc([Job(1, 5), Job(2, 90), Job(3, 99)], 0.0)
    assert keys == [5, 99, 90]
    assert eddc([Job(1, 5), Job(2, 2), Job(3, 99)], 50.0) == [5, 2, 99]
    assert eddc([Job(1, 5)], 0.0) == [5]


def test_the_correction_as_printed_never_helps() -> None:
    rng, worse = random.Random(4), 0
    for _ in range(300):
        jobs = [Job(rng.randint(1, 9), rng.randint(1, 25)) for _ in range(4)]
        plain = tardiness(jobs, sorted(range(4), key=lambda at: (jobs[at].due_s, jobs[at].service_s)))
        keys = eddc(jobs, 0.0)
        corrected = tardiness(jobs, sorted(range(4), key=lambda at: (keys[at], jobs[at].service_s)))
        assert corrected >= plain
        worse += corrected > plain
    assert worse > 10


def test_urgency_is_slack() -> None:
    assert slack([Job(2, 10), Job(8, 12)], 3.0) == [8, 4]


def test_when_a_request_is_due() -> None:
    def due(**more: object) -> float:
        return due_s(make_request("a", range(4), 11, arrival_s=100.0, **more))

    assert due(deadline_s=130.0) == 130.0
    assert due(slo=SLO(2.0, 0.5)) == 107.0
    assert due(slo=SLO(tpot_s=0.5)) == 105.0
    assert due(slo=SLO(2.0, 0.5), deadline_s=103.0) == 103.0
    assert due() == due(slo=SLO()) == due(deadline_s=1e9) == 100.0 + LONGEST_S
    assert due(deadline_s=3.0) == 100.0


def test_service_is_predicted_from_steps_and_answers_so_far() -> None:
    policy = Due(mdd, EngineSettings(token_budget=8, inter_token_ms=100.0))
    request = View(prompt_tokens=20, known_tokens=20, limit_tokens=40)
    assert policy.service_s(request) == pytest.approx(0.1 * (3 + 19))  # nothing known: to the limit
    for _ in range(3000):
        policy.observe(events.StepDone(0.0, 0, 0.02, 8, Run(1, 0.02), 0, 0.0))
    assert policy.service_s(request) == pytest.approx(0.02 * (3 + 19), rel=1e-3)


def test_the_mean_step_is_the_same_one_by_one_and_all_at_once() -> None:
    run = Run(700, 0.02, 1e-5)
    once, each = Due(mdd, EngineSettings()), Due(mdd, EngineSettings())
    once.observe(events.StepDone(0.0, 0, run.total_s, 8, run, 0, 0.0))
    for step in range(run.steps):
        each.observe(events.StepDone(0.0, 0, 0.0, 8, run.after(step)._replace(steps=1), 0, 0.0))
    request = View()
    assert once.service_s(request) == pytest.approx(each.service_s(request), rel=1e-12)


@pytest.mark.parametrize(("ordering", "expected"), [("mddc", 141), ("mdd", 144)])
def test_the_six_jobs_through_a_scheduler(ordering: str, expected: int) -> None:
    """One request at a time, a second per token: the scheduler reaches the paper's total tardiness, to the second."""
    rig = Rig(ordering=ordering, max_running=1, inter_token_ms=1000.0, token_budget=1, budget=1)
    for number, (service, due) in enumerate(SIX):
        rig.add(make_request(str(number), [number] * int(service), 1, slo=SLO(ttft_s=due)))
    while rig.scheduler.live:
        plan = rig.scheduler.plan(rig.now)
        assert plan is not None
        rig.now += 1.0
        rig.collect(rig.scheduler.commit(rig.executor.perform(plan), rig.now))
    ends = {event.request_id: event.at_s for event in rig.recorder.of(events.Finished)}
    assert sum(max(0.0, ends[str(number)] - job.due_s) for number, job in enumerate(SIX)) == expected


def test_after_patience_the_due_date_decides() -> None:
    """Under a load that never ends, MDD would let a long late request wait for ever."""
    policy = Due(mdd, EngineSettings(inter_token_ms=1000.0))
    late = View(make_request("late", range(4), arrival_s=0.0, slo=SLO(1.0)), limit_tokens=400)
    now = 1.0 + PATIENCE_S + 1
    fresh = View(make_request("fresh", range(4), arrival_s=now, slo=SLO(1.0)), limit_tokens=12)
    policy.survey([late, fresh], now)
    assert policy(late, now) < policy(fresh, now)
    policy.survey([late, fresh], 300.0)
    assert policy(fresh, 300.0) > 0
