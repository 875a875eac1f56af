"""Questions in settings: what is simulated for them, that they survive the trip to another process, and clear noes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import BadSetting, EngineSettings
from headrace.core.types import HeadraceError
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.placement import BadPlacement
from headrace.sim.hardware import UnknownName
from headrace.sim.scenario import KVS, WEIGHTS, Scenario, parse_hardware, shape_of
from headrace.sim.settings import FORMATS, SimulateSettings
from headrace.workload.settings import WorkloadSettings


def asked(engine: EngineSettings | None = None, rate: float = 4.0, **words: object) -> Scenario:
    traffic = (WorkloadSettings(arrivals=f"poisson:{rate}", requests=200),)
    return Scenario(SimulateSettings(**words), engine or EngineSettings(), traffic)  # type: ignore[arg-type]


def test_the_site_is_that_of_the_catalogue() -> None:
    site = asked(model="llama-3.1-70b", hardware="4xH100-SXM", replicas=3).site()
    assert isinstance(site.cost, Analytic)
    where = site.cost.placement
    assert where.parallel.tensor == 4
    assert where.weight_bytes == pytest.approx(70.6e9 * 2 / 4, rel=0.01)
    free = 0.9 * 80e9 - where.weight_bytes
    assert site.capacity.blocks * 16 == pytest.approx(free / where.kv_bytes_per_token, abs=16)
    assert site.capacity.max_context_tokens == 131_072
    assert site.capacity.steps > 1
    assert site.replicas == 3


def test_formats_change_bytes_and_speed() -> None:
    plain, small = asked().site(), asked(weights="int4", kv="fp8").site()
    assert isinstance(plain.cost, Analytic)
    assert isinstance(small.cost, Analytic)
    assert small.cost.placement.layer_weights == plain.cost.placement.layer_weights
    assert small.cost.placement.weight_bytes < 0.45 * plain.cost.placement.weight_bytes
    assert small.capacity.blocks > 2 * plain.capacity.blocks
    assert set(FORMATS) == set(WEIGHTS) == set(KVS)


def test_the_step_is_as_long_as_the_target_allows() -> None:
    fast, slow = (asked(EngineSettings(inter_token_ms=ms), hardware="A10G").site() for ms in (200.0, 400.0))
    assert 128 < fast.token_budget < slow.token_budget
    assert asked(EngineSettings(token_budget=77)).site().token_budget == 77


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"hardware": "3xH100-SXM", "model": "llama-3.1-70b"}, "64 query heads cannot be cut over 3 devices"),
        ({"hardware": "L4", "model": "llama-3.1-70b"}, "does not fit on L4"),
        ({"hardware": "H1000"}, "did you mean"),
        ({"model": "llama-3.1-70"}, "llama-3.1-70b"),
        ({"hardware": "2x4xH100-SXM"}, "@ib-ndr"),
        ({"hardware": "2x4xH100-SXM@string"}, "link"),
        ({"hardware": ""}, "is not NAME"),
        ({"hardware": "4xH100-SXM", "pipeline": 3}, "3 stages"),
        ({"model": "nowhere/config.json"}, "cannot read"),
    ],
)
def test_what_cannot_be_is_refused_in_words(words: dict[str, object], named: str) -> None:
    with pytest.raises(HeadraceError, match=named):
        asked(**words).site()


@pytest.mark.parametrize("words", [{"replicas": 0}, {"memory_use": 1.5}, {"attain": float("nan")}, {"host_ms": -1.0}])
def test_settings_have_bounds(words: dict[str, object]) -> None:
    with pytest.raises(BadSetting, match="must be between"):
        asked(**words)


def test_hardware_is_nodes_by_devices() -> None:
    topology = parse_hardware("2x8xH100-SXM@ib-ndr")
    assert (topology.nodes, topology.devices_per_node, topology.devices) == (2, 8, 16)
    assert topology.uplink is not None
    assert parse_hardware("H100-SXM").devices == 1
    assert parse_hardware("4xH100-SXM").devices_per_node == 4


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(st.sampled_from("0123456789xH@-SXM100ibndr "), max_size=20))
def test_any_hardware_is_read_or_refused(text: str) -> None:
    try:
        assert parse_hardware(text).devices >= 1
    except HeadraceError:
        pass


def test_a_config_file_will_do(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 500,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)) == shape_of(str(tmp_path / "config.json"))
    assert shape_of(str(tmp_path)).hidden == 64
    with pytest.raises(UnknownName):
        shape_of("no-such-model")


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 9),
    speed=st.floats(0.01, 100),
    replicas=st.integers(1, 9),
    trace=st.sampled_from([None, Path("some") / "trace.csv"]),
    slo=st.sampled_from([None, "ttft=1.0"]),
)
def test_it_goes_to_another_process_and_is_the_same(
    seed: int, speed: float, replicas: int, trace: Path | None, slo: str | None
) -> None:
    traffic = (WorkloadSettings(seed=seed, trace=trace, slo=slo), WorkloadSettings(arrivals="even:3", tenant="b"))
    scenario = Scenario(SimulateSettings(replicas=replicas), EngineSettings(max_running=7), traffic, speed)
    assert Scenario.from_json(scenario.to_json()) == scenario


def test_faster_is_the_same_traffic_sooner() -> None:
    scenario = asked()
    doubled = scenario.faster(2.0)
    assert doubled.rate() == pytest.approx(2 * scenario.rate())
    lengths = [[(one.prompt_tokens, one.output_tokens) for one in each.arrivals()] for each in (scenario, doubled)]
    assert lengths[0] == lengths[1]


def test_a_closed_loop_has_no_rate() -> None:
    with pytest.raises(BadSetting, match="no rate"):
        Scenario(traffic=(WorkloadSettings(arrivals="closed:4"),)).rate()


def test_placement_errors_are_typed() -> None:
    with pytest.raises(BadPlacement):
        asked(tensor=2).site()
