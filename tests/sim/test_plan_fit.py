"""Does it fit, how many, how fast: against arithmetic by hand, the simulator's capacity and the published limits."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from golden import golden

from headrace.core.config import BadSetting
from headrace.core.shape import BF16
from headrace.sim.cost.bounds import memory_efficiency
from headrace.sim.cost.placement import BadPlacement
from headrace.sim.hardware import device
from headrace.sim.plan import fit_told
from headrace.sim.plan.fit import Fit, fit
from headrace.sim.plan.settings import FitSettings
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings


def value(found: Fit, name: str) -> float:
    return next(number.value for number in found.numbers if number.name == name)


def test_the_numbers_of_a_dense_model_are_those_on_paper() -> None:
    found = fit("llama-3.1-70b", FitSettings(device="4xH100-SXM"))
    assert value(found, "parameters") == pytest.approx(70.55e9, rel=1e-3)
    assert value(found, "weights") == pytest.approx(value(found, "parameters") * BF16.bytes_per_weight / 4, rel=1e-9)
    assert value(found, "KV per token") == 2 * 8 * 128 * 80 * 2
    free = 0.9 * 80e9 - value(found, "weights")
    assert value(found, "KV memory") == free // (value(found, "KV per token") / 4)
    assert value(found, "largest context") == 131_072
    assert value(found, "requests side by side") == value(found, "KV memory") // 1280


@pytest.mark.parametrize("hardware", ["8xH100-SXM", "2xL40S", "A10G"])
def test_what_is_told_is_what_the_simulator_has(hardware: str) -> None:
    found = fit("llama-3.1-8b", FitSettings(device=hardware))
    capacity = Scenario(SimulateSettings(model="llama-3.1-8b", hardware=hardware)).site().capacity
    assert value(found, "KV memory") // capacity.block_tokens == capacity.blocks


def test_more_side_by_side_is_more_in_all_and_less_for_each() -> None:
    speeds = fit("llama-3.1-8b", FitSettings(batches="1,4,16,64")).speeds
    assert [one.requests for one in speeds[:4]] == [1, 4, 16, 64]
    for few, many in pairwise(speeds):
        assert many.served_per_s > few.served_per_s and many.token_s >= few.token_s
        assert many.joules_per_token < few.joules_per_token
        assert many.served_per_s < many.tokens_per_s  # prompts take time too
    assert speeds[0].bound == "memory"


def test_a_latent_vector_and_a_mixture_are_counted_as_such() -> None:
    found = fit("deepseek-v3", FitSettings(device="8xH200-SXM", weights="fp8"))
    assert value(found, "KV per token") == (512 + 64) * 61 * 2
    assert (
        "37" in next(one.shown for one in found.numbers if one.name == "parameters") or "36.6" in found.numbers[0].shown
    )


def test_what_does_not_fit_names_what_would() -> None:
    with pytest.raises(
        BadPlacement, match=r"141\.1 GB .* 72\.0 GB .*--weights int4; or --device 2xH100-SXM; or .*B200"
    ):
        fit("llama-3.1-70b", FitSettings())
    for ways in ({"weights": "int4"}, {"device": "2xH100-SXM"}, {"device": "B200-SXM"}):
        fit("llama-3.1-70b", FitSettings(**ways))  # and they are true  # type: ignore[arg-type]


def test_the_limits_of_long_contexts_are_the_published_ones() -> None:
    """Yi-34B on an A100-80GB at its full memory: users within two of the paper's, times within its tolerances."""
    case = golden("long_context.json")["ours"][0]
    found = fit("yi-34b", FitSettings(device="A100-80GB", memory_use=1.0))
    (limit, *_) = found.long
    assert limit.tokens == 4096
    assert limit.prefill_s == pytest.approx(case["prefill_s_with_attn_LS2D"] * 4096 / case["ctx"], rel=0.02)
    assert 250 * limit.decode_s == pytest.approx(case["decode_250_s"], rel=0.02)


def test_weights_in_the_host_are_bounded_as_moe_lens_says() -> None:
    found = fit("mixtral-8x7b", FitSettings(device="2xA100-80GB", prompt_tokens=98, output_tokens=32))
    chip = device("A100-80GB")
    assert found.streamed is not None and chip.host is not None
    kv_tokens = 0.9 * chip.memory_bytes / (value(found, "KV per token") / 2)
    by_memory = memory_efficiency(98, 32) * kv_tokens / (value(found, "weights") / chip.host.bytes_per_s)
    if found.streamed.bound == "memory":
        assert found.streamed.tokens_per_s == pytest.approx(by_memory, rel=1e-9)
    else:
        assert found.streamed.tokens_per_s < by_memory


def test_work_is_shown_and_json_is_whole() -> None:
    found = fit("llama-3.1-8b", FitSettings())
    assert "2 x 8 x 128" not in fit_told.told(found, show_work=False)
    worked = fit_told.told(found, show_work=True)
    assert "2 x 8 x 128 x 32 x 2 " in worked and "from the model's shape" in worked
    assert {"numbers", "speeds", "long", "streamed", "swings"} <= set(json.loads(fit_told.as_json(found)))
    assert all(swing.served <= 1.0 + 1e-9 for swing in found.swings)


@pytest.mark.parametrize("bad", [{"batches": "1,x"}, {"batches": ""}, {"memory_use": 2.0}, {"prompt_tokens": 0}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        FitSettings(**bad)  # type: ignore[arg-type]
