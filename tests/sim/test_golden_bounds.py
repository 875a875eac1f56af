"""MoE-Lens and the long-context paper: closed forms against their published numbers."""

from typing import Any

import pytest
from golden import golden

from headrace.sim.cost.bounds import (
    LongContext,
    exact_memory_efficiency,
    memory_efficiency,
    saturating_tokens,
    streamed_throughput,
)
from headrace.sim.hardware import Link, device
from headrace.sim.models import model

LENS, LONG = golden("moe_lens.json"), golden("long_context.json")


@pytest.mark.parametrize("case", LENS["cases"], ids=str)
def test_parallelism_memory_efficiency(case: dict[str, Any]) -> None:
    p, g = case["p"], case["g"]
    assert memory_efficiency(p, g) == pytest.approx(case["pme_closed"], rel=1e-12)
    assert exact_memory_efficiency(p, g) == pytest.approx(case["pme_sum"], rel=1e-12)
    assert memory_efficiency(p, g) / exact_memory_efficiency(p, g) == pytest.approx((g + 1) / g, rel=1e-12)
    assert exact_memory_efficiency(p, g) == pytest.approx((p + g) / sum(p + j for j in range(g + 1)), rel=1e-12)


@pytest.mark.parametrize("case", LENS["throughput"], ids=lambda case: f"p{case['p']}-g{case['g']}")
def test_throughput_of_a_streamed_mixture(case: dict[str, Any]) -> None:
    ours = streamed_throughput(case["p"], case["g"], case["kv_tokens"], case["delta_s"], case["T_GPU"])
    assert ours.tokens_per_s == pytest.approx(case["expected_tok_s"], rel=1e-12)
    assert ours.bound == case.get("bound", "memory")


def test_throughput_is_linear_in_kv_up_to_the_knee_and_flat_beyond() -> None:
    knee = 3600 * 4.8 / memory_efficiency(98, 32)
    half, at, beyond = (streamed_throughput(98, 32, share * knee, 4.8, 3600) for share in (0.5, 1.0, 2.0))
    assert half.tokens_per_s == pytest.approx(1800) and half.bound == "memory"
    assert at.tokens_per_s == pytest.approx(3600) and beyond.tokens_per_s == 3600 and beyond.bound == "compute"


def test_a_mixture_needs_more_tokens_to_hide_its_weights() -> None:
    """The paper's A40 with Mixtral: 150 TFLOP/s over 32 GB/s, eight experts for two: 18,750 by plain arithmetic."""
    assert saturating_tokens(model("mixtral-8x7b"), 150e12, Link("pcie4", 32e9, 0)) == 18_750
    assert saturating_tokens(model("llama-2-7b"), 150e12, Link("pcie4", 32e9, 0)) == 150e12 / 32e9


PAPER = {4000: LONG["paper"]["4K"], 50000: LONG["paper"]["50K"]}
USERS_SLACK = 2  # "about 20" users at 4K: 18 by arithmetic


@pytest.mark.parametrize("case", LONG["ours"], ids=lambda case: str(case["ctx"]))
def test_the_four_numbers_of_a_long_context(case: dict[str, Any]) -> None:
    a100 = LongContext(model("yi-34b"), device("A100-80GB"), weights=34e9, weight_bytes=68e9)
    tokens, paper, allowed = case["ctx"], PAPER[case["ctx"]], LONG["tolerance"]
    assert a100.kv_bytes(tokens) == case["kv_bytes"] == case["kv_GiB"] * 2**30
    assert a100.kv_bytes(tokens) / 2**30 == pytest.approx(paper["kv_GB"], rel=0.05)  # printed to two digits
    shape = a100.shape
    attention_s = shape.layers * tokens**2 * shape.hidden / a100.device.bf16_flops_per_s
    assert a100.prefill_s(tokens) - attention_s == pytest.approx(case["prefill_s_2NS"], rel=1e-9)
    assert a100.prefill_s(tokens) == pytest.approx(case["prefill_s_with_attn_LS2D"], rel=1e-12)
    assert a100.decode_s(tokens, 250) == pytest.approx(case["decode_250_s"], rel=1e-12)
    assert a100.switch_s(tokens, 20 * 2**30) == pytest.approx(case["switch_s_out_and_in_20GBps"], rel=1e-12)
    assert a100.users(tokens, 80 * 2**30) == case["concurrency_80GB"]  # memory is in GiB, weights in GB
    assert a100.prefill_s(tokens) == pytest.approx(paper["prefill_s"], rel=allowed["prefill"])
    assert a100.decode_s(tokens, 250) == pytest.approx(paper["decode_250tok_s"], rel=allowed["decode"])
    assert a100.switch_s(tokens, 20 * 2**30) == pytest.approx(paper["switch_s"], rel=allowed["switch"])
    assert abs(a100.users(tokens, 80 * 2**30) - paper["users"]) <= USERS_SLACK


def test_the_parameter_count_the_paper_uses_is_that_of_the_shape() -> None:
    assert model("yi-34b").active_weights == pytest.approx(34e9, rel=0.003)
