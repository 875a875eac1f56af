"""LLM-Viewer: whole models, every layer of one of them, and the printed digits of its paper's table."""

from math import floor, log10
from typing import Any

import pytest
from golden import golden

from headrace.core.shape import KVFormat, WeightFormat
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, batch_of
from headrace.sim.cost.conventions import LLM_VIEWER
from headrace.sim.cost.operators import Demand
from headrace.sim.cost.placement import Formats, Placement
from headrace.sim.hardware import Device, Topology
from headrace.sim.models import model

DATA = golden("llm_viewer.json")
LLAMA_7B = DATA["cases"][0]


def device(name: str) -> Device:
    numbers = DATA["hardware_used_bytes_s_and_flops"][name]
    return Device(name, "gpu", numbers["fp16"], 48e9, numbers["bw"], int8_flops_per_s=numbers["int8"])


def viewer(case: dict[str, Any]) -> Analytic:
    formats = Formats(WeightFormat("w", case["w_bit"]), KVFormat("kv", case["kv_bit"]), case["a_bit"])
    placement = Placement(model(case["model"]), Topology(device(case["hw"]), 1), formats=formats)
    return Analytic(placement, LLM_VIEWER)


def batch(case: dict[str, Any], stage: str) -> Batch:
    row = (case["seqlen"] - 1, 1) if stage == "decode" else (0, case["seqlen"])
    return batch_of([row] * case["batch"], case["batch"])


@pytest.mark.parametrize("name", DATA["models"])
def test_the_shapes_are_those_of_the_catalogue(name: str) -> None:
    theirs, ours = DATA["models"][name], model(name)
    assert theirs == {
        "h": ours.hidden,
        "i": ours.ffn,
        "L": ours.layers,
        "nh": ours.heads,
        "kvh": ours.kv_heads,
        "v": ours.vocab,
    }


@pytest.mark.parametrize("stage", ["decode", "prefill"])
@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: f"{case['model']}-b{case['batch']}-w{case['w_bit']}")
def test_a_whole_model(case: dict[str, Any], stage: str) -> None:
    cost, expected = viewer(case).estimate(batch(case, stage)), case["total"][stage]
    assert cost.flops == pytest.approx(expected["OPs"], rel=1e-12)
    assert cost.memory_bytes == pytest.approx(expected["memory_access"], rel=1e-12)
    assert cost.seconds == pytest.approx(expected["time"], rel=1e-12)


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: f"{case['model']}-b{case['batch']}-w{case['w_bit']}")
def test_memory(case: dict[str, Any]) -> None:
    placement = viewer(case).placement
    layers = placement.shape.layer_weights * placement.formats.weights.bytes_per_weight
    assert layers == case["weight_bytes_no_embed_head"]
    assert placement.kv_bytes_per_token * case["seqlen"] * case["batch"] == case["kv_cache_bytes"]


def operators(stage: str) -> dict[str, Demand]:
    return {name: demand for name, _, demand in viewer(LLAMA_7B).operators(batch(LLAMA_7B, stage))}


@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_every_layer_of_llama_2_7b(stage: str) -> None:
    ours, theirs = operators(stage), LLAMA_7B["per_layer"][stage]
    assert set(ours) == set(theirs)
    for name, row in theirs.items():
        demand = ours[name]
        assert demand.flops == row["OPs"] and demand.nbytes == row["memory_access"], name
        assert demand.flops / demand.nbytes == pytest.approx(row["ai"], rel=1e-12), name
        assert demand.seconds == pytest.approx(row["time"], rel=1e-12), name
        assert ("compute" if demand.compute_s > demand.memory_s else "memory") == row["bound"], name
        assert demand.flops / demand.seconds == pytest.approx(row["perf"], rel=1e-12), name


TABLE = DATA["paper_table1_llama2_7b_A6000_s2048_b1"]["rows"]
NAMES = {"norm": "attn_norm", "add": "attn_add"}


def printed(value: float, like: str | float) -> bool:
    """Whether `value` rounds, or is cut, to the printed number: '69G', 1024, '1T'."""
    text = str(like)
    unit = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
    number = float(text.rstrip("KMGT"))
    digit = 1.0 if "." not in text else 10 ** -len(text.rstrip("KMGT").split(".")[1])
    scaled = value / unit
    slack = digit if number else 10 ** floor(log10(scaled))
    return abs(scaled - number) < slack


@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_the_printed_table_of_the_paper(stage: str) -> None:
    ours = operators(stage)
    for name, (ops, memory, intensity, perf, bound) in TABLE[stage].items():
        demand = ours[NAMES.get(name, name)]
        assert printed(demand.flops, ops) and printed(demand.nbytes, memory), name
        assert printed(demand.flops / demand.nbytes, intensity), name
        assert printed(demand.flops / demand.seconds, perf), name
        assert ("compute" if demand.compute_s > demand.memory_s else "memory") == bound, name


def test_eight_bit_weights_activations_and_kv_use_the_eight_bit_peak() -> None:
    """The published pair: batch 16 of Llama-2-13b decodes in 51.49 ms, and in 25.75 ms with W8A8KV8."""
    case = next(case for case in DATA["cases"] if case["batch"] == 16)
    eight = viewer(case | {"w_bit": 8, "a_bit": 8, "kv_bit": 8})
    assert eight.estimate(batch(case, "decode")).seconds * 1e3 == pytest.approx(25.75, abs=0.005)
