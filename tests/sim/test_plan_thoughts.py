"""Test-time compute by Kinetics' formulas and by the cost model, and APIs by their latencies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.core.config import BadSetting
from headrace.core.shape import KV_BF16
from headrace.sim.cost.fit import BadSamples
from headrace.sim.models import model
from headrace.sim.plan import api, thoughts
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings


def place(name: str = "qwen3-8b") -> thoughts.Place:
    site = Scenario(SimulateSettings(model=name)).site()
    tokens = site.capacity.blocks * site.capacity.block_tokens
    return thoughts.Place(name, model(name), site.cost, site.windows, tokens, KV_BF16, 4.0, 8)


def test_attention_outweighs_small_models_long_before_large_ones() -> None:
    """Kinetics: for 500 tokens of prompt and 16 K of thought, more than tenfold for the smallest model."""
    small, large = (thoughts.effort(model(name), 500, 16_384, 1) for name in ("qwen3-0.6b", "qwen3-32b"))
    ratios = [(one.eflops - one.parameter_flops) / one.parameter_flops for one in (small, large)]
    assert ratios[0] > 10 and ratios[1] < ratios[0] / 4
    shape = model("qwen3-0.6b")
    wide = shape.heads * shape.head_dim * shape.layers
    assert small.attention_flops == 2 * (2 * 500 + 16_384) * 16_384 * wide
    read = sum(500 + step + 0.5 for step in range(16_384)) * KV_BF16.bytes_per_token(shape)
    assert small.kv_bytes == pytest.approx(read, rel=1e-9)


def test_samples_share_their_prompt() -> None:
    shape = model("qwen3-8b")
    one, many = (thoughts.effort(shape, 8000, 1000, count) for count in (1, 16))
    assert many.parameter_flops == 16 * one.parameter_flops and many.kv_bytes < 16 * one.kv_bytes


@given(st.integers(1, 4000), st.sampled_from(thoughts.LENGTHS[:4]), st.sampled_from(thoughts.SAMPLES[:5]))
@bounded(max_examples=25, derandomize=True, deadline=None)
def test_more_thought_costs_more(prompt: int, tokens: int, samples: int) -> None:
    there = place()
    seconds, joules = thoughts.cost_of(there, prompt, tokens, samples)
    assert 0 < seconds < thoughts.cost_of(there, prompt, 2 * tokens, samples)[0]
    assert seconds < 1.001 * thoughts.cost_of(there, prompt, tokens, 2 * samples)[0]
    assert joules > 0


def test_a_budget_is_kept_and_what_it_turns_down_has_a_reason() -> None:
    found = list(thoughts.thoughts(place(), 500, 5.0, None))
    assert any(one.reason for one in found) and any(not one.reason for one in found)
    assert all((one.seconds <= 5.0) == (not one.reason) for one in found)
    told = thoughts.answer(found, "qwen3-8b", "5 s a question", 500)
    assert told.headline[0].startswith("qwen3-8b within 5 s") and told.rejected
    none = list(thoughts.thoughts(place(), 500, None, 1e-9))
    assert thoughts.answer(none, "qwen3-8b", "$1e-9", 500).headline[0].startswith("NOTHING")


RUNS = [(p, o, 0.05 + 0.0004 * p + 0.02 * (o - 1)) for p in (100, 1000, 2000) for o in (1, 20, 80)]


def test_an_api_is_fitted_to_its_quickest_runs() -> None:
    noisy = [*RUNS, *((p, o, 3 * seconds) for p, o, seconds in RUNS)]
    found = api.api(noisy, None, (), None)
    assert found.fitted.token_s == pytest.approx(0.02, rel=1e-6) and found.r2 == pytest.approx(1.0)
    assert found.fitted.prompt_s == pytest.approx((0.09, 0.45, 0.85))
    site = Scenario(SimulateSettings(model="llama-3.1-8b")).site()
    beside = api.api(RUNS, site.cost, site.windows, 4.0)
    assert len(beside.ratios) == 9 and all(mine > theirs for _, _, mine, theirs in beside.ratios)
    assert "alone would take" in api.answer(beside, "llama-3.1-8b on H100-SXM").headline[1]


def test_many_prompt_lengths_are_thinned() -> None:
    runs = [(p, o, 0.01 * p + 0.1 * o) for p in range(1, 40) for o in (1, 9)]
    assert len(api.api(runs, None, (), None).fitted.prompt_tokens) == api.MOST_KNOTS


@pytest.mark.parametrize("text", ["p,o,s\n1,2\n", "1,2,3\n3,4,oops", "1,2,-5", "0,1,1"])
def test_bad_tables_are_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="line"):
        api.read(text)


def test_a_table_is_read_and_one_length_is_too_few() -> None:
    assert api.read("prompt;output;seconds\n1;2;0.5\n\n3,4,1e-1") == [(1, 2, 0.5), (3, 4, 0.1)]
    with pytest.raises(BadSamples):
        api.api([(1, 2, 0.5)], None, (), None)
