"""Speculation in virtual time: as many tokens as asked for come out whatever is guessed, acceptance follows its law,
and goodput decides: drafts pay for few requests, and cost nothing for many."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_rig import Linear, traffic

from headrace.core.config import BadSetting, EngineSettings
from headrace.core.ports import Capacity
from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.drafts import Acceptance, parse_acceptance
from headrace.sim.run import Report, Site, simulate
from headrace.workload.arrival import Arrival, Stretch

CAPACITY = Capacity(2000, 4, 4096, 100, steps=1000)


class Roofline:
    """A pass over the weights takes as long as 32 tokens."""

    def estimate(self, batch: Batch) -> StepCost:
        return StepCost(3e-4 * max(32, batch.tokens) + 1e-8 * (batch.full.pairs + batch.full.decode_context))

    def line(self, batch: Batch, steps: int) -> Line:
        return Line(self.estimate(batch).seconds, 0.0, 1)


def run(requests: int, tokens: int, rate: str, speculate: str = "lookup", **more: object) -> Report:
    """One after the other within half a second, on a replica that drafts."""
    arrivals = [Arrival(0.5 * at / requests, (Stretch(50, at),), tokens) for at in range(requests)]
    setting = EngineSettings(block_tokens=4, speculate=speculate, **more)  # type: ignore[arg-type]
    site = Site(setting, CAPACITY, Roofline(), 512, acceptance=parse_acceptance(rate))
    return simulate(arrivals, site)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    blocks=st.integers(40, 160),
    budget=st.integers(1, 60),
    drafts=st.integers(1, 9),
    rate=st.sampled_from(["0", "0.5", "1", "0.9,0.2", "0:1"]),
    control=st.sampled_from(["always", "goodput"]),
    cancels=st.sampled_from([0.0, 0.3]),
)
def test_every_answer_is_as_long_as_it_should_be(  # type: ignore[no-untyped-def]
    seed, blocks, budget, drafts, rate, control, cancels
) -> None:
    arrivals = list(traffic(seed, 30, 40.0, cancels=cancels))
    setting = EngineSettings(block_tokens=4, speculate="lookup", draft_tokens=drafts, draft_control=control)
    capacity = replace(CAPACITY, blocks=blocks, max_context_tokens=4 * blocks)
    site = Site(setting, capacity, Linear(), budget, acceptance=parse_acceptance(rate, seed))
    totals = simulate(arrivals, site).totals
    assert totals.completed + totals.finished.get("abort", 0) == len(arrivals)
    if not cancels:
        assert totals.output_tokens == sum(one.output_tokens for one in arrivals)
    assert 0 <= totals.accepted_tokens <= totals.drafted_tokens
    assert rate != "1" or control != "always" or totals.accepted_tokens > 0


def test_acceptance_follows_its_law() -> None:
    drafted = [parse_acceptance("0.8,0.5", seed=3).accepted(str(name), 7, 4) for name in range(20_000)]
    for right, chance in enumerate((0.2, 0.8 * 0.5, 0.8 * 0.25, 0.8 * 0.125, 0.8 * 0.125)):
        assert drafted.count(right) / len(drafted) == pytest.approx(chance, abs=0.012)


def test_requests_have_rates_of_their_own() -> None:
    law = parse_acceptance("0.2:0.8")
    means = [sum(law.accepted(str(name), at, 1) for at in range(2000)) / 2000 for name in range(200)]
    assert min(means) < 0.25 < 0.75 < max(means)
    assert sum(means) / 200 == pytest.approx(0.5, abs=0.04)


def test_luck_does_not_depend_on_the_step() -> None:
    law = Acceptance((0.6,), (0.6,))
    for start in range(50):
        whole = law.accepted("a", start, 8)
        assert law.accepted("a", start, 3) == min(whole, 3)
        if whole:
            assert law.accepted("a", start + 1, 7) == whole - 1


@pytest.mark.parametrize("text", ["", "often", "1.5", "0.5:", "0.1:0.2:0.3", "-0.1", "nan"])
def test_what_is_no_chance_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="draft-acceptance"):
        parse_acceptance(text)


def test_few_requests_draft_and_many_do_not() -> None:
    few, many = run(1, 400, "0.8").totals, run(200, 200, "0.8").totals
    assert few.accepted_tokens > 0.6 * few.output_tokens
    assert many.drafted_tokens < 0.05 * many.output_tokens


@pytest.mark.parametrize("requests", [1, 4, 16, 100])
@pytest.mark.parametrize("rate", ["0.95", "0.7", "0.3", "0"])
def test_goodput_is_close_to_the_best_fixed_length(requests: int, rate: str) -> None:
    """SmartSpec's claim: never slower than not to draft, and near the best of all lengths."""
    adaptive = run(requests, 200, rate, draft_tokens=8).totals.span_s
    fixed = [run(requests, 200, rate, draft_control="always", draft_tokens=length) for length in (1, 3, 8)]
    plain = run(requests, 200, rate, speculate="off").totals.span_s
    assert adaptive < 1.02 * plain
    assert adaptive < 1.2 * min(report.totals.span_s for report in fixed)


def test_a_simulation_with_drafts_repeats() -> None:
    assert run(20, 50, "0.3:0.9").digest == run(20, 50, "0.3:0.9").digest
