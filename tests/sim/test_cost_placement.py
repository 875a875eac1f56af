import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.shape import BF16, FP32, KV_BF16, KVFormat, WeightFormat
from headrace.core.types import HeadraceError
from headrace.sim.cost.network import NOTHING, collective
from headrace.sim.cost.placement import BadPlacement, Formats, Parallel, Placement
from headrace.sim.hardware import Link, Topology, device, link
from headrace.sim.models import model

EIGHT = Topology(device("H100-SXM"), 8)
LLAMA = model("llama-3.1-70b")
LINK = Link("x", 1e11, 1e-6)


def place(name: str, formats: Formats | None = None, **parallel: int | bool) -> Placement:
    return Placement(model(name), EIGHT, Parallel(**parallel), formats or Formats())  # type: ignore[arg-type]


def test_one_device_holds_every_weight() -> None:
    for name in ("llama-3.1-70b", "deepseek-v3", "gpt-2", "gpt-oss-120b"):
        assert place(name).weight_bytes == pytest.approx(2 * model(name).weights, rel=1e-12)


def test_cutting_divides_weights_and_kv() -> None:
    assert place("llama-3.1-70b", tensor=8).weight_bytes == pytest.approx(place("llama-3.1-70b").weight_bytes / 8)
    assert place("llama-3.1-70b", tensor=8).kv_bytes_per_token == 327_680 / 8
    assert place("llama-3.1-70b", pipeline=8).kv_bytes_per_token == 327_680 / 8


def test_kv_heads_repeat_when_there_are_fewer_than_devices() -> None:
    four = place("qwen2-7b", tensor=4)
    assert Placement(model("qwen2-7b"), EIGHT, Parallel(tensor=4)).kv_shards == 4
    seven = Placement(model("qwen2-7b"), EIGHT, Parallel(tensor=7))
    assert seven.kv_bytes_per_token == four.kv_bytes_per_token and seven.kv_shards == 4
    assert place("deepseek-v3", tensor=8).kv_bytes_per_token == KV_BF16.bytes_per_token(model("deepseek-v3"))


def test_attention_copies_trade_weights_for_kv() -> None:
    """APEX+'s second plan of its README: attention twice, feed-forward cut, and the KV of half the requests each."""
    cut, copied = place("llama-3.1-70b", tensor=2), place("llama-3.1-70b", tensor=2, data=2)
    assert copied.layer_weights > cut.layer_weights
    assert copied.kv_bytes_per_token == 2 * cut.kv_bytes_per_token
    eight, bits8 = Topology(device("H200-SXM"), 8), Formats(WeightFormat("fp8", 8))
    once, each = (Placement(model("deepseek-v3"), eight, Parallel(8, data=n), bits8).kv_tokens() for n in (1, 8))
    assert each > 4 * once > 0  # one latent vector on one device, not the same one on eight


def test_quantised_weights_leave_the_tables_at_16_bits() -> None:
    w4 = Formats(WeightFormat("w4g128", 4, group=128, overhead_bits=32))
    placed = place("llama-3.1-70b", w4)
    tables = 2 * LLAMA.vocab * LLAMA.hidden * 2
    assert placed.weight_bytes == pytest.approx(LLAMA.layer_weights * 4.25 / 8 + tables)
    assert Formats(FP32).head_bytes == 4 and Formats(head=WeightFormat("w8", 8)).head_bytes == 1


def test_kv_capacity_counts_what_the_weights_leave() -> None:
    placed = place("llama-3.1-70b", tensor=4)
    free = 0.9 * 80e9 - placed.weight_bytes - 1e9
    assert placed.kv_tokens(0.9, 1e9) == int(free // (327_680 / 4))
    assert place("llama-3.1-70b").kv_tokens() == 0  # 141 GB do not fit in 72
    half = Placement(LLAMA, EIGHT, Parallel(tensor=4), Formats(BF16, KVFormat("int8", 8)))
    assert half.kv_tokens() == pytest.approx(2 * placed.kv_tokens(), abs=1)


def test_swapping_uses_every_devices_own_road() -> None:
    host = device("H100-SXM").host
    assert host is not None
    assert place("llama-3.1-70b", tensor=8).swap_s(4000) == pytest.approx(2 * (host.latency_s + 4000 * 40_960 / 64e9))
    cpu = Placement(model("smollm2-135m"), Topology(device("EPYC-9654"), 1))
    with pytest.raises(BadPlacement, match="nowhere to swap"):
        cpu.swap_s(1)


@pytest.mark.parametrize(
    ("name", "parallel", "says"),
    [
        ("llama-3.1-70b", Parallel(tensor=0), "at least 1"),
        ("llama-3.1-70b", Parallel(tensor=4, data=3), "evenly"),
        ("llama-3.1-70b", Parallel(tensor=3), "64 query heads"),
        ("gpt-2", Parallel(pipeline=13), "12 layers"),
        ("llama-3.1-70b", Parallel(tensor=8, pipeline=2), "needs 16 devices"),
        ("llama-3.1-70b", Parallel(tensor=2, spread_experts=True), "0 experts"),
    ],
)
def test_cuts_that_cannot_be_are_refused(name: str, parallel: Parallel, says: str) -> None:
    topology = Topology(device("H100-SXM"), 8) if name != "gpt-2" else Topology(device("L4"), 16)
    with pytest.raises(BadPlacement, match=says):
        Placement(model(name), topology, parallel)


@given(st.integers(2, 64), st.floats(0, 1e9))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(devices: int, nbytes: float) -> None:
    ring = {kind: collective(kind, devices, LINK, 0.0) for kind in ("all_reduce", "reduce_scatter", "all_gather")}
    halves = ring["reduce_scatter"].seconds(nbytes) + ring["all_gather"].seconds(nbytes)
    assert ring["all_reduce"].seconds(nbytes) == pytest.approx(halves)
    assert ring["all_reduce"].moved < 2


def test_one_device_talks_to_nobody() -> None:
    assert collective("all_reduce", 1, LINK) == NOTHING
    with pytest.raises(HeadraceError, match="all_reduce"):
        collective("broadcast", 2, LINK)


MEASURED_US = {  # all-reduce of 128 MiB in 16 bits on four devices, APEX+'s tables
    "H100-SXM": 611,
    "H200-SXM": 610,
    "A100-80GB": 1007,
}


@pytest.mark.parametrize("name", MEASURED_US)
def test_the_share_of_a_fabric_that_collectives_reach_is_the_measured_one(name: str) -> None:
    fabric = device(name).fabric
    assert fabric is not None
    slowed = Link(fabric.name, 0.70 * fabric.bytes_per_s, fabric.latency_s)
    assert collective("all_reduce", 4, slowed).seconds(2**27) * 1e6 == pytest.approx(MEASURED_US[name], rel=0.10)


def test_a_group_across_nodes_is_as_slow_as_the_uplink() -> None:
    two = Topology(device("H100-SXM"), 8, 2, link("ib-ndr"))
    assert Placement(LLAMA, two, Parallel(tensor=8, pipeline=2)).topology.link(2, 8).name == "ib-ndr"
