"""Published throughput: the data is complete, predictions are what they say, and those that were right stay right."""

from collections import Counter
from dataclasses import replace

import pytest

from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import batch_of
from headrace.sim.cost.conventions import HEADRACE, IDEAL
from headrace.sim.cost.network import SETUP_S, collective, exchange
from headrace.sim.cost.placement import Parallel, Placement
from headrace.sim.hardware import Link, Topology, device, link
from headrace.sim.models import model
from headrace.sim.published import (
    CLOSE,
    UNGROUPED,
    Experiment,
    Prediction,
    by_system,
    experiments,
    formats,
    placement,
    predict,
)

ALL = list(experiments())
CHEAP = ("TensorRT-LLM 0.6", "LMDeploy 0.1", "QServe", "gpt-fast", "DistServe")  # a hundred rows in two seconds


def test_the_data_is_complete() -> None:
    systems = Counter(experiment.system for experiment in ALL)
    assert len(systems) >= 8 and len(ALL) >= 100
    for experiment in ALL:
        placed = placement(experiment)  # model, device, formats and cut exist and fit each other
        assert experiment.published > 0 and experiment.source and experiment.reason
        assert experiment.fits or experiment.batch == 1 or placed.kv_tokens(experiment.memory_share) > 0
        assert experiment.measured in ("output", "prompt", "total", "decode", "user")


def test_formats_are_as_wide_as_they_say() -> None:
    assert formats("fp8").head_bytes == 2 and formats("int8-weights").head_bytes == 1
    assert formats("int4-g32").weights.bytes_per_weight == pytest.approx(5 / 8)
    assert formats("w4a8kv4-g128").weights.bytes_per_weight == pytest.approx(4.125 / 8)


def experiment(**fields: object) -> Experiment:
    basis = Experiment(
        "s", "f", "llama-2-7b", "A100-80GB", "output", "replica", 1.0, 1, ((5, 20),), "prefill-first", "bf16"
    )
    return replace(basis, **fields)  # type: ignore[arg-type]


def test_a_prediction_is_the_simulated_sum_of_steps() -> None:
    one = experiment()
    cost = Analytic(placement(one))
    steps = [batch_of([(0, 5)], 1), *(batch_of([(5 + i, 1)], 1) for i in range(19))]
    seconds = sum(cost.estimate(step).seconds for step in steps)
    assert predict(one).predicted == pytest.approx(20 / seconds)
    assert predict(replace(one, measured="total")).predicted == pytest.approx(25 / seconds)
    assert predict(replace(one, measured="user")).predicted == pytest.approx(
        19 / (seconds - cost.estimate(steps[0]).seconds)
    )
    assert predict(one, host_s=0.01).predicted == pytest.approx(20 / (seconds + 20 * 0.01))


def test_a_batch_decodes_together_and_more_than_fits_waits() -> None:
    batch = experiment(measured="decode", batch=8, lengths=((100, 20),), fits=True)
    assert predict(batch).predicted == pytest.approx(8 * predict(replace(batch, measured="user")).predicted)
    small = experiment(batch=64, requests=64, lengths=((1000, 100),), memory_share=0.2)
    assert predict(small).predicted < 0.7 * predict(replace(small, fits=True)).predicted


def test_the_best_of_several_lengths_and_the_share_of_a_device() -> None:
    short, long = experiment(lengths=((5, 20),)), experiment(lengths=((2000, 20),))
    both = experiment(lengths=((2000, 20), (5, 20)))
    assert predict(both).predicted == predict(short).predicted > predict(long).predicted
    two = experiment(tensor=2)
    assert predict(replace(two, per="device")).predicted == pytest.approx(predict(two).predicted / 2)


def test_close_is_a_fifth_either_way_and_a_system_its_median() -> None:
    one = experiment(published=100.0)
    rows = [Prediction(one, value) for value in (80.0, 120.0, 150.0)]
    assert [row.close for row in rows] == [True, True, False]
    (system,) = by_system(rows)
    assert system.close == 2 and system.median_error == pytest.approx(0.2) and system.predicted == (0.2 <= CLOSE)
    assert not by_system(rows[2:])[0].predicted


@pytest.fixture(scope="module")
def cheap() -> dict[str, tuple[Prediction, ...]]:
    predictions = [predict(experiment) for experiment in ALL if experiment.system in CHEAP]
    return {system.name: system.predictions for system in by_system(predictions)}


# Rows within 20 %, of all rows of the system: what benchmarks/published.py prints.
WITHIN = {"TensorRT-LLM 0.6": (27, 37), "LMDeploy 0.1": (32, 60), "QServe": (4, 16), "gpt-fast": (4, 13)}


@pytest.mark.parametrize("name", WITHIN)
def test_what_was_predicted_stays_predicted(cheap: dict[str, tuple[Prediction, ...]], name: str) -> None:
    right, rows = WITHIN[name]
    assert len(cheap[name]) == rows
    assert sum(prediction.close for prediction in cheap[name]) >= right
    assert by_system(cheap[name])[0].predicted == (name in ("TensorRT-LLM 0.6", "LMDeploy 0.1"))


def test_a_roofline_is_never_much_too_slow(cheap: dict[str, tuple[Prediction, ...]]) -> None:
    """What a model of what must be done leaves out only ever takes more time."""
    assert min(prediction.error for rows in cheap.values() for prediction in rows) > -0.10


@pytest.mark.parametrize(
    "row", [row for row in ALL if row.system == "TensorRT-LLM 1.0"][3::4], ids=lambda row: row.setting
)
def test_more_than_fits_of_long_prompts_and_answers(row: Experiment) -> None:
    """2048 and 2048 tokens, of all three models on both devices."""
    assert row.lengths == ((2048, 2048),)
    assert predict(row).close


def test_why_old_kernels_miss_on_grouped_heads(cheap: dict[str, tuple[Prediction, ...]]) -> None:
    """Up to two and a half times too fast; within a quarter if the KV is read once for every query head."""
    misses = [row for row in cheap["TensorRT-LLM 0.6"] if row.experiment.grouped and not row.close]
    assert len(misses) >= 8 and max(row.error for row in misses) > 1.4
    assert all(abs(predict(row.experiment, UNGROUPED).error) < 0.27 for row in misses)


# ------------------------------------------------------------------------------------------------ rules of the roofline

NODES = Topology(device("H100-SXM"), 8, 4, link("ib-ndr"))


def test_what_devices_add_up_is_as_wide_as_a_sum() -> None:
    llama, decode = model("llama-3.1-70b"), batch_of([(100, 1)] * 64, 64)
    eight = Analytic(Placement(llama, NODES, Parallel(tensor=8), formats("fp8"))).estimate(decode)
    sixteen = Analytic(Placement(llama, NODES, Parallel(tensor=8))).estimate(decode)
    assert eight.network_bytes == sixteen.network_bytes and eight.network_s == sixteen.network_s


def test_a_token_visits_a_node_once_however_many_of_its_experts_are_there() -> None:
    """DeepSeek-V3 over four nodes: 8 experts are on 2.7 of the 3 other nodes, in 8 bits there and 16 back."""
    shape, spread = model("deepseek-v3"), Parallel(tensor=32, data=32, spread_experts=True)
    cost = Analytic(Placement(shape, NODES, spread, formats("fp8-kv16")))
    tokens = 32 * 1024
    step = cost.estimate(batch_of([(0, 1024)] * 32, 0))
    layers = shape.layers - shape.dense_layers
    crossing = 3 * (1 - (3 / 4) ** 8) * shape.hidden * (1 + 2)
    assert step.network_bytes == pytest.approx(tokens * layers * crossing)


def test_an_all_to_all_waits_for_one_latency_and_a_ring_for_all() -> None:
    slow = Link("x", 1e11, 1e-3)
    assert exchange(32, slow).seconds(0) == pytest.approx(SETUP_S + 1e-3)
    assert collective("all_to_all", 32, slow).seconds(0) == pytest.approx(SETUP_S + 31e-3)
    assert exchange(32, slow).s_per_byte == pytest.approx(collective("all_to_all", 32, slow).s_per_byte)
    assert exchange(1, slow).seconds(1e9) == 0


def test_eight_bit_products_reach_what_was_measured() -> None:
    """709 of a thousand on an H100; 16 bits, and devices nobody measured, reach the share of the convention."""
    prefill = batch_of([(0, 4096)], 0)
    for name, kind, share in (("H100-SXM", "fp8", 0.709), ("H100-SXM", "bf16", 0.83), ("L40S", "fp8", 0.83)):
        placed = Placement(model("llama-3.1-8b"), Topology(device(name), 1), formats=formats(kind))
        ours, ideal = (
            {op: demand for op, _, demand in Analytic(placed, convention).operators(prefill)}["feed-forward"].compute_s
            for convention in (HEADRACE, IDEAL)
        )
        assert ideal / ours == pytest.approx(share), (name, kind)
