"""GenZ's operator tables, its two model-level cases and its collectives, to twelve digits."""

import ast
from dataclasses import replace
from typing import Any

import pytest
from golden import golden

from headrace.core.shape import ModelShape
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, batch_of
from headrace.sim.cost.conventions import GENZ
from headrace.sim.cost.network import collective, point_to_point
from headrace.sim.cost.operators import Demand
from headrace.sim.cost.placement import Parallel, Placement
from headrace.sim.hardware import Device, Link, Topology
from headrace.sim.models import model

DATA = golden("genz.json")
CASES = {case["name"]: case for case in DATA["cases"]}
MODELS = {"llama2_7b": "llama-2-7b", "gpt-2": "gpt-2", "mixtral_8x7b": "mixtral-8x7b"}
GIB = 2**30


def genz_device(system: dict[str, Any], link: Link | None = None) -> Device:
    """GenZ writes GB/s and means 2^30 bytes a second; FLOPs are decimal."""
    return Device("tpu", "tpu", system["tflops"] * 1e12, 1e12, system["mem_bw_GiB_s"] * GIB, fabric=link)


def genz(name: str, system: dict[str, Any], tensor: int = 1, link: Link | None = None) -> Analytic:
    convention = replace(GENZ, compute_share=system["compute_eff"], memory_share=system["mem_eff"])
    topology = Topology(genz_device(system, link), tensor)
    return Analytic(Placement(model(MODELS[name]), topology, Parallel(tensor=tensor)), convention)


def batches(case: dict[str, Any]) -> list[Batch]:
    """A prefill is one batch. A decode table has its attention twice: over the prompt, and over the output so far."""
    if case["stage"] == "prefill":
        return [batch_of([(0, case["input_tokens"])] * case["batch"], case["batch"])]
    contexts = sorted({ast.literal_eval(op["dim"])[1][2] for op in case["ops"] if op["op"] == "Logit"}, reverse=True)
    return [batch_of([(context - 1, 1)] * case["batch"], case["batch"]) for context in contexts]


def rows(case: dict[str, Any]) -> list[tuple[str, Demand]]:
    """Our operators in the order of GenZ's table."""
    model_cost, out = genz(case["model"], case["system"], case["tp"]), []
    spans = [{name: demand for name, _, demand in model_cost.operators(batch)} for batch in batches(case)]
    out.append(("qkv", spans[0]["qkv"]))
    out += [("logit", span["logit"]) for span in spans] + [("attend", span["attend"]) for span in spans]
    out += [(name, spans[0][name]) for name in ("out", "router", "up", "down") if name in spans[0]]
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_an_operator_table(name: str) -> None:
    case, ours = CASES[name], rows(CASES[name])
    assert len(ours) == len(case["ops"])
    for (label, demand), row in zip(ours, case["ops"], strict=True):
        assert demand.flops == pytest.approx(row["mflop"] * 1e6, rel=1e-12), label
        assert demand.seconds * 1e3 == pytest.approx(row["latency_ms"], rel=1e-12), label
        assert demand.flops / demand.seconds == pytest.approx(row["tflops"] * 1e12, rel=1e-12), label
        assert ("Compute" if demand.compute_s >= demand.memory_s else "Memory") == row["bound"], label
    layer_ms = sum(demand.seconds for _, demand in ours) * 1e3
    assert layer_ms == pytest.approx(case["per_layer_latency_ms"], rel=1e-12)


@pytest.mark.parametrize("case", DATA["model_level"], ids=lambda case: case["name"])
def test_a_whole_model(case: dict[str, Any]) -> None:
    cost = genz(case["model"], case["system"], case["tp"]).estimate(
        batch_of([(0, case["input_tokens"])] * case["batch"], case["batch"])
    )
    assert cost.seconds * 1e3 == pytest.approx(case["expected"]["latency_ms"], rel=1e-12)
    assert 1 / cost.seconds * case["batch"] == pytest.approx(case["expected"]["throughput"], rel=1e-12)
    assert cost.bound == "compute" and cost.network_s == case["expected"]["breakdown_ms_linear_attn_comm"][2]


def test_gpt_2_on_four_chips_spends_most_of_its_time_in_24_all_reduces() -> None:
    """The second published model-level number: 5.886358809914 ms, of which 4.48275 ms are collectives."""
    system = DATA["model_level"][0]["system"]
    four = genz("gpt-2", system, 4, Link("ici", 50 * GIB, 1e-6)).estimate(batch_of([(0, 4096)], 1))
    assert four.network_s * 1e3 == pytest.approx(4.48275, rel=1e-12)
    assert four.seconds * 1e3 == pytest.approx(5.886358809914, rel=1e-12)


def test_model_and_operator_views_are_the_same_sum() -> None:
    case = CASES["llama2_7b_prefill_on_TPU"]
    whole = genz(case["model"], case["system"]).estimate(batches(case)[0])
    layers: ModelShape = model("llama-2-7b")
    assert whole.seconds * 1e3 == pytest.approx(layers.layers * case["per_layer_latency_ms"], rel=1e-12)


@pytest.mark.parametrize("case", DATA["collectives_formula_goldens"]["cases"], ids=str)
def test_a_collective(case: dict[str, Any]) -> None:
    link = Link("golden", case["bw_GiB_s"] * GIB, case["link_us"] * 1e-6)
    ours = collective(case["kind"], case["nodes"], link).seconds(case["bytes"])
    assert ours * 1e3 == pytest.approx(case["expected_ms"], rel=1e-12)


def test_all_to_all_and_point_to_point_follow_their_formulas() -> None:
    link = Link("golden", 50 * GIB, 1e-6)
    assert collective("all_to_all", 4, link).seconds(6144) == collective("all_gather", 4, link).seconds(6144)
    assert point_to_point(link).seconds(6144) == pytest.approx(1e-6 + 6144 / (50 * GIB), rel=1e-12)


def test_a_mixture_wakes_experts_until_all_are_taken() -> None:
    """The stated rule: min(E, T k) experts as one wide product, the router's bytes through memory in a decode."""
    system = DATA["cases"][0]["system"]
    shape, bandwidth = model("mixtral-8x7b"), 0.8 * 1200 * GIB
    mixtral = genz("mixtral_8x7b", system)
    operators = {name: demand for name, _, demand in mixtral.operators(batch_of([(999, 1)], 1))}
    assert operators["down"].nbytes == 2 * shape.ffn * shape.hidden * 2  # two experts of two bytes a weight
    router = (shape.hidden * shape.experts + shape.hidden + shape.experts) * 2
    assert operators["router"].seconds == pytest.approx(router / bandwidth, rel=1e-12)
    many = {name: demand for name, _, demand in mixtral.operators(batch_of([(999, 1)] * 5, 5))}
    assert many["down"].nbytes == 8 * shape.ffn * shape.hidden * 2
