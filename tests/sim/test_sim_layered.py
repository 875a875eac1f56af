"""Layered prefill priced: what the paper's argument says about expert weights, obtained by simulating both batches."""

from __future__ import annotations

import random

import pytest

from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.operators import expected_experts
from headrace.sim.cost.placement import Parallel, Placement
from headrace.sim.hardware import Topology, device
from headrace.sim.models import model
from headrace.sim.run import Site, simulate
from headrace.sim.stats import Totals
from headrace.workload.arrival import Arrival, Stretch

PROMPT, CHUNK = 8192, 512


def totals(name: str, batch: str, decodes: int) -> Totals:
    """One long prompt beside so many that decode, which leave CHUNK tokens of every step."""
    shape = model(name)
    cost = Analytic(Placement(shape, Topology(device("H100-SXM"), 2), Parallel(2)))
    arrivals = [Arrival(0.0, (Stretch(1),), 64) for _ in range(decodes)]
    arrivals.append(Arrival(0.001, (Stretch(PROMPT),), 1))
    setting = EngineSettings(batch=batch, prefix_cache=False)
    capacity = Capacity(10_000, 16, 16_384, shape.vocab, layers=shape.layers)
    return simulate(arrivals, Site(setting, capacity, cost, CHUNK + decodes)).totals


def expert_bytes(name: str, decodes: int) -> tuple[float, float]:
    """While the prompt is computed, (chunked, layered): S/c L act(c+B) b and L act(S+B) b + (G-1) L act(B) b, with
    act(n) = E (1 - (1 - k/E)^n)."""
    shape = model(name)
    groups, expert = PROMPT // CHUNK, 2.0 * shape.expert_weights

    def woken(tokens: int) -> float:
        return shape.layers * expected_experts(tokens, shape.experts, shape.experts_per_token) * expert

    return groups * woken(CHUNK + decodes), woken(PROMPT + decodes) + (groups - 1) * woken(decodes)


@pytest.mark.parametrize(("decodes", "saved"), [(4, 0.72), (16, 0.33), (32, 0.12), (64, 0.02)])
def test_experts_are_loaded_once_for_a_prompt(decodes: int, saved: float) -> None:
    """Saves 72 % of expert bytes beside 4 decodes, and nothing beside as many as wake all experts anyway."""
    chunked, layered = (totals("qwen3-30b-a3b", batch, decodes) for batch in ("chunked", "layered"))
    assert chunked.steps == layered.steps
    expected = expert_bytes("qwen3-30b-a3b", decodes)
    assert 1 - expected[1] / expected[0] == pytest.approx(saved, abs=0.01)
    difference = chunked.spent.memory_bytes - layered.spent.memory_bytes
    assert difference == pytest.approx(expected[0] - expected[1], abs=0.02 * expected[0])
    if decodes <= 16:
        assert layered.ttft_s.quantile(1.0) < 0.9 * chunked.ttft_s.quantile(1.0)


def test_dense_models_gain_nothing() -> None:
    chunked, layered = (totals("llama-3.1-8b", batch, 16) for batch in ("chunked", "layered"))
    assert chunked.steps == layered.steps
    assert layered.spent.memory_bytes == pytest.approx(chunked.spent.memory_bytes, rel=0.02)
    assert layered.spent.flops == pytest.approx(chunked.spent.flops, rel=1e-3)


def test_a_service_gains_what_the_paper_says() -> None:
    """The setting of the paper's server, Qwen3-30B-A3B on two H100, 1.5 long prompts a second: TTFT -70 %, end to end
    -41 %, energy per token -22 %, and the time between tokens is shorter, too."""
    shape, rng, at_s, arrivals = model("qwen3-30b-a3b"), random.Random(1), 0.0, list[Arrival]()
    for _ in range(150):
        at_s += rng.expovariate(1.5)
        arrivals.append(Arrival(at_s, (Stretch(6000),), 150))
    cost = Analytic(Placement(shape, Topology(device("H100-SXM"), 2), Parallel(2)), host_s=5e-4)
    capacity = Capacity(50_000, 16, 16_384, shape.vocab, layers=shape.layers)
    chunked, layered = (
        simulate(arrivals, Site(EngineSettings(batch=batch), capacity, cost, CHUNK)).totals
        for batch in ("chunked", "layered")
    )
    assert layered.ttft_s.mean / chunked.ttft_s.mean == pytest.approx(0.30, abs=0.1)
    assert layered.e2e_s.mean / chunked.e2e_s.mean == pytest.approx(0.59, abs=0.1)
    assert layered.spent.joules / chunked.spent.joules == pytest.approx(0.78, abs=0.1)
    assert layered.tpot_s.mean < 0.85 * chunked.tpot_s.mean
