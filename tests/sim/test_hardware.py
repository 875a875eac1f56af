import json
from pathlib import Path

import pytest

from headrace.core.types import HeadraceError
from headrace.sim.hardware import Link, Topology, UnknownName, device, device_names, link, link_names, source

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "hardware.json"


def test_every_number_of_every_device_has_a_source_that_is_spelled_out() -> None:
    for name in device_names():
        entry = device(name)
        assert {"bf16_tflops", "memory_GB", "memory_GBps"} <= {field for field, _ in entry.sources}
        for _, keys in entry.sources:
            assert keys and all(source(key) for key in keys.split())


def test_numbers_are_plausible_and_ordered() -> None:
    for name in device_names():
        entry = device(name)
        assert 1e12 <= entry.bf16_flops_per_s <= 1e16 and 1e10 <= entry.memory_bytes_per_s <= 1e14, name
        assert not entry.fp8_flops_per_s or entry.fp8_flops_per_s >= entry.bf16_flops_per_s, name
        assert not entry.max_w or entry.static_w < entry.max_w, name
        assert entry.confidence and (entry.kind == "cpu") == (entry.host is None), name
    assert all(link(name).bytes_per_s > 0 and link(name).latency_s > 0 for name in link_names())


GOLDEN_FIELDS = {
    "bf16_tflops": ("bf16_flops_per_s", 1e12),
    "fp16_tflops": ("bf16_flops_per_s", 1e12),
    "fp8_tflops": ("fp8_flops_per_s", 1e12),
    "fp4_tflops": ("fp4_flops_per_s", 1e12),
    "int8_tops": ("int8_flops_per_s", 1e12),
    "mem_GB": ("memory_bytes", 1e9),
    "mem_GBps": ("memory_bytes_per_s", 1e9),
    "tdp_W": ("max_w", 1.0),
    "usd_h": ("usd_per_hour", 1.0),
}


@pytest.mark.skipif(not GOLDEN.exists(), reason="the shared golden files are not beside this checkout")
def test_the_collected_table_of_26_devices_is_ours() -> None:
    golden = json.loads(GOLDEN.read_text())
    table = golden["devices"] | golden["extra_devices"]
    assert len(table) == 26
    for name, row in table.items():
        ours = device(name)
        for key, (field, scale) in GOLDEN_FIELDS.items():
            if row.get(key) is not None:
                # A6000: the table rounds LLM-Viewer's 154.8385 to 154.8
                assert getattr(ours, field) == pytest.approx(row[key] * scale, rel=3e-4), (name, key)
        if row.get("intra_GBps"):
            assert ours.fabric is not None and ours.fabric.bytes_per_s == row["intra_GBps"] * 1e9, name
        if row.get("pcie_GBps"):
            assert ours.host is not None and ours.host.bytes_per_s == row["pcie_GBps"] * 1e9, name


def test_names_are_found_in_any_case_and_missing_ones_get_suggestions() -> None:
    assert device("h100-sxm") is not None and device("h100-sxm") == device("H100-SXM")
    with pytest.raises(UnknownName, match="H100-SXM"):
        device("H100 SXM5")
    with pytest.raises(UnknownName, match="ib-ndr"):
        link("ndr-ib")
    with pytest.raises(UnknownName, match=r"known are .*A100-80GB"):
        device("qqqqqqqq")


def test_the_peak_follows_the_wider_operand() -> None:
    h100, a100, b200 = device("H100-SXM"), device("A100-80GB"), device("B200-SXM")
    assert h100.flops_per_s(4, 16) == h100.bf16_flops_per_s  # 4-bit weights are widened before they are multiplied
    assert h100.flops_per_s(8, 8) == h100.fp8_flops_per_s
    assert a100.flops_per_s(8, 8) == a100.int8_flops_per_s
    assert h100.flops_per_s(4, 4) == h100.fp8_flops_per_s and b200.flops_per_s(4, 4) == b200.fp4_flops_per_s
    assert device("TPUv5p").flops_per_s(8, 8) == device("TPUv5p").bf16_flops_per_s
    assert device("V100").flops_per_s(8, 8) == device("V100").bf16_flops_per_s  # its 8-bit units are slower
    assert h100.flops_per_s(32, 32) == h100.fp32_flops_per_s


def test_static_power_defaults_to_a_share_of_the_maximum() -> None:
    assert device("H100-SXM").static_w == pytest.approx(210)
    assert device("TPUv5e").static_w == 0


def test_a_ring_is_as_slow_as_its_slowest_link() -> None:
    h100 = device("H100-SXM")
    cluster = Topology(h100, devices_per_node=8, nodes=2, uplink=link("ib-ndr"))
    assert cluster.devices == 16
    assert cluster.link(8) == h100.fabric
    assert cluster.link(16) == link("ib-ndr")
    assert cluster.link(2, stride=8) == link("ib-ndr")  # the same place in the two nodes
    assert Topology(device("L4"), 4).link(4) == device("L4").host
    assert Topology(device("EPYC-9654"), 2).link(2).name == "socket"


def test_topologies_that_cannot_be_are_refused() -> None:
    with pytest.raises(HeadraceError, match="uplink"):
        Topology(device("L4"), 1, nodes=2)
    with pytest.raises(HeadraceError, match="at least one"):
        Topology(device("L4"), 0)


def test_a_transfer_pays_latency_once() -> None:
    assert Link("x", 1e9, 1e-3).transfer_s(2e9) == pytest.approx(2.001)
