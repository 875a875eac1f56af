"""APEX+: memory of the plans in its README, its collective tables, and the step times it measured on 8 H100."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
from golden import golden

from headrace.core.shape import KVFormat, WeightFormat
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import StepCost, batch_of
from headrace.sim.cost.conventions import HEADRACE
from headrace.sim.cost.fewshot import Corrections, FewShot, find_corrections
from headrace.sim.cost.network import collective
from headrace.sim.cost.placement import Formats, Parallel, Placement
from headrace.sim.hardware import Link, Topology, device
from headrace.sim.models import model

DATA = golden("apex.json")
NODE = Topology(device("H100-SXM"), 8)
GIB = 2**30

# ------------------------------------------------------------------------------------------ memory of the plans

README = DATA["readme_example"]
PLANS = {0: Parallel(tensor=2), 1: Parallel(tensor=2, data=2), 2: Parallel(pipeline=2)}


@pytest.mark.parametrize("plan", README["plans"], ids=lambda plan: f"{plan['attn']}-{plan['ffn']}-pp{plan['pp']}")
def test_weights_and_kv_of_the_three_plans(plan: dict[str, Any]) -> None:
    """Decoder blocks only, in GiB of an 80 GiB device, as the tool counts."""
    placed = Placement(model("llama-3-70b"), NODE, PLANS[plan["rank"]])
    weights = placed.layer_weights * 2 / GIB
    assert weights == pytest.approx(plan["param_gb_per_device"], abs=0.051)  # printed to one digit
    assert 80 - weights == pytest.approx(plan["kv_or_act_gb_per_device"], abs=0.051)


def test_weights_are_exact() -> None:
    check = DATA["check_param_size"]
    cut, copied = (Placement(model("llama-3-70b"), NODE, PLANS[i]) for i in (0, 1))
    assert cut.shape.layer_weights == check["params_decoder_blocks"]
    assert cut.layer_weights * 2 / GIB == check["gib_per_device"]
    assert copied.layer_weights * 2 / GIB == check["with_attn_replicated_gib"]


# ------------------------------------------------------------------------------------------- measured step times


@dataclass(frozen=True)
class Row:
    """One measured deployment: mean time per output token of one replica."""

    model: str
    tensor: int
    copies: int
    tpot_s: float
    label: str

    def price(self) -> StepCost:
        """A decode step of the roofline. The trace sends half a request a second, so about one runs at a time."""
        eight = Formats(WeightFormat("fp8", 8), KVFormat("fp8", 8), 8)
        formats = eight if self.model.startswith("mistral") else Formats()
        placed = Placement(model(self.model), NODE, Parallel(tensor=self.tensor), formats)
        return Analytic(placed).estimate(batch_of([(200, 1)], 1))


def parsed(row: dict[str, Any]) -> Row:
    found = re.fullmatch(r"(?:(\d)DP)?(\d)TP", row["parallel"])
    assert found
    name = "llama-3.1-70b" if "/llama" in row["trace"] else "mistral-large-123b"
    return Row(name, int(found[2]), int(found[1] or 1), row["tpot_s"], row["file"].split("/")[-1].split(".")[0])


ROWS = [parsed(row) for row in DATA["measured_on_8xH100_SXM_80GB"]["rows"]]
LLAMA = [row for row in ROWS if row.model == "llama-3.1-70b"]
MISTRAL = [row for row in ROWS if row.model == "mistral-large-123b"]


def calibrated(rows: list[Row]) -> Corrections:
    """From the two ends, as the published check does: one replica on 2 and on 8 devices."""
    ends = [row for row in rows if row.copies == 1 and row.tensor in (2, 8)]
    assert len(ends) == 2
    return find_corrections([(row.price(), row.tpot_s) for row in ends])


class Priced:
    """A cost model that is one number, to put corrections on."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost

    def estimate(self, _: object) -> StepCost:
        return self.cost

    def line(self, _: object, steps: int) -> Any:
        raise AssertionError("not asked for")


def error(row: Row, corrections: Corrections) -> float:
    model_ = FewShot(Priced(row.price()), corrections)
    return model_.estimate(batch_of([(200, 1)], 1)).seconds / row.tpot_s - 1


@pytest.mark.parametrize("row", [row for row in LLAMA if row.tensor == 4 or row.copies > 1], ids=lambda row: row.label)
def test_two_measurements_predict_the_other_deployments_of_llama(row: Row) -> None:
    """Stated tolerance: 5 %. Fitted on 2 and 8 devices, predicted on 4, and on every split of the trace."""
    assert abs(error(row, calibrated(LLAMA))) < 0.05


# The same procedure on the 8-bit model. Known misses beyond 5 %, with their sizes: the two ends ask for 8 ms outside
# memory and network (Llama for 4.6), which neither four devices nor the quarter traces on two show. The file of one
# replica on four carries no format in its name and may not be fp8.
MISTRAL_MISSES = {
    "mistral_lmsys_05_validation_4TP": 0.075,
    "mistral_lmsys_05_validation_4DP2TP_fp8_1": 0.067,
    "mistral_lmsys_05_validation_4DP2TP_fp8_2": 0.074,
    "mistral_lmsys_05_validation_4DP2TP_fp8_3": 0.060,
}


@pytest.mark.parametrize("row", [row for row in MISTRAL if row.tensor != 8], ids=lambda row: row.label)
def test_what_the_same_procedure_does_for_an_8_bit_model(row: Row) -> None:
    miss = error(row, calibrated(MISTRAL))
    if row.label in MISTRAL_MISSES:
        assert miss == pytest.approx(MISTRAL_MISSES[row.label], abs=0.005)
    else:
        assert abs(miss) < 0.05


@pytest.mark.parametrize("row", LLAMA, ids=lambda row: row.label)
def test_the_roofline_alone_misses_what_the_host_spends(row: Row) -> None:
    """Nothing fitted: what is missing is about 5 ms a step whatever the plan, the host's work in vLLM 0.6.0."""
    assert row.tpot_s - row.price().seconds == pytest.approx(4.9e-3, abs=0.7e-3)


# ----------------------------------------------------------------------------------------------- collective tables

FABRICS = {"H100-SXM-80GB": "H100-SXM", "H200-SXM-141GB": "H200-SXM", "A100-SXM-80GB(pull/6, not merged)": "A100-80GB"}


def measured_us(table: list[dict[str, Any]], devices: int, kilobytes: int) -> float:
    for row in table:
        values = {key.split("(")[0]: value for key, value in row.items()}
        gpus = int(values.get("gpus") or values.get("num_gpus_per_node") or 0)
        size = float(values.get("kb", values.get("size", -1)))
        if (gpus, size, values["dtype"]) == (devices, kilobytes, "half"):
            return float(values.get("us", values.get("time", 0)))
    raise LookupError((devices, kilobytes))


def ring_us(name: str, kind: str, devices: int, kilobytes: int) -> float:
    fabric = device(FABRICS[name]).fabric
    assert fabric is not None
    slowed = Link(fabric.name, HEADRACE.network_share * fabric.bytes_per_s, fabric.latency_s)
    return collective(kind.replace("alltoall", "all_to_all"), devices, slowed).seconds(kilobytes * 1024) * 1e6


# Known misses: an A100's collectives of one pass need twice the ring's time at 16 MiB, and reach it at 128 MiB.
SLOW_A100 = {"all_gather": 0.42, "reduce_scatter": 0.35, "alltoall": 0.44}


@pytest.mark.parametrize("name", FABRICS)
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "alltoall"])
@pytest.mark.parametrize("kilobytes", [16384, 131072])
def test_large_collectives_are_within_a_third_of_the_measured(name: str, kind: str, kilobytes: int) -> None:
    ours, measured = ring_us(name, kind, 4, kilobytes), DATA["collective_profiles_us"][name][kind]
    error_ = ours / measured_us(measured, 4, kilobytes) - 1
    if name.startswith("A100") and kilobytes == 16384 and kind in SLOW_A100:
        assert error_ == pytest.approx(-SLOW_A100[kind], abs=0.01)
    else:
        assert abs(error_) < 1 / 3


@pytest.mark.parametrize("name", ["H100-SXM-80GB", "H200-SXM-141GB"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_small_all_reduces_are_within_a_third_of_the_measured(name: str, devices: int) -> None:
    """A decode step's message: 16 KiB, one token of a 70B model."""
    measured = measured_us(DATA["collective_profiles_us"][name]["all_reduce"], devices, 16)
    assert ring_us(name, "all_reduce", devices, 16) == pytest.approx(measured, rel=1 / 3)
