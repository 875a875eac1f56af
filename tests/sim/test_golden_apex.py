"""APEX+: memory of the plans in its README, its collective tables, and the step times it measured on 8 H100."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import exp
from random import Random
from typing import Any

import pytest
from golden import golden

from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.core.shape import KVFormat, WeightFormat
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import batch_of
from headrace.sim.cost.conventions import HEADRACE
from headrace.sim.cost.fewshot import Corrections, FewShot, find_corrections
from headrace.sim.cost.linear import Regimes
from headrace.sim.cost.network import collective
from headrace.sim.cost.placement import Formats, Parallel, Placement
from headrace.sim.executor import MOST_STEPS
from headrace.sim.hardware import Link, Topology, device
from headrace.sim.models import model
from headrace.sim.run import Site, simulate
from headrace.workload.arrival import Arrival, Stretch

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


def test_the_order_of_the_three_plans() -> None:
    """Times by order only, as the trace was not published: a hundred requests of its mean lengths, as many at once as
    the best plan had on average. Memory is counted as there: decoder blocks and KV fill 80 GiB."""
    first = README["plans"][0]
    count = round(first["req_s"] * first["time_s"]["Total"])
    output_tokens = round(first["gen_tok_s"] / first["req_s"])
    prompt_tokens = round(first["proc_tok_s"] / first["req_s"]) - output_tokens
    settings = EngineSettings(prefix_cache=False, max_running=round(first["reqs_per_iter"]))
    same = Arrival(0.0, (Stretch(prompt_tokens),), output_tokens, max_new_tokens=output_tokens)
    seconds = {}
    for plan in README["plans"]:
        placed = Placement(model("llama-3-70b"), NODE, PLANS[plan["rank"]])
        free = (80 * GIB - placed.layer_weights * 2) * placed.parallel.data
        capacity = Capacity(int(free / placed.kv_bytes_per_token / 16), 16, 8192, 32_000, MOST_STEPS)
        totals = simulate([same] * count, Site(settings, capacity, Analytic(placed), 65_536)).totals
        assert totals.completed == count
        seconds[plan["rank"]] = totals.span_s
    assert seconds[0] < seconds[1] < seconds[2]
    published = {plan["rank"]: plan["time_s"]["Total"] for plan in README["plans"]}
    assert published[0] < published[1] < published[2]


def test_weights_are_exact() -> None:
    check = DATA["check_param_size"]
    cut, copied = (Placement(model("llama-3-70b"), NODE, PLANS[i]) for i in (0, 1))
    assert cut.shape.layer_weights == check["params_decoder_blocks"]
    assert cut.layer_weights * 2 / GIB == check["gib_per_device"]
    assert copied.layer_weights * 2 / GIB == check["with_attn_replicated_gib"]


# ------------------------------------------------------------------------------------------- measured on eight H100

SETUP = DATA["measured_on_8xH100_SXM_80GB"]
REQUESTS, RATE = 1024, 0.5  # of the LMSYS trace; a split deals both out to its copies
EIGHT_BITS = Formats(WeightFormat("fp8", 8), KVFormat("fp8", 8), 8)


@dataclass(frozen=True)
class Row:
    """One measured replica: mean time to the first token and per later one, under its share of the trace."""

    model: str
    tensor: int
    copies: int
    ttft_s: float
    tpot_s: float  # as printed: the time after the first token over all tokens
    prompt_tokens: float
    output_tokens: float
    latency_s: float  # summed over requests
    label: str

    @property
    def requests(self) -> int:
        return REQUESTS // self.copies

    @property
    def rate(self) -> float:
        return RATE / self.copies

    @property
    def lengths(self) -> tuple[int, int]:
        return round(self.prompt_tokens / self.requests), round(self.output_tokens / self.requests)

    @property
    def roofline(self) -> Analytic:
        formats = EIGHT_BITS if self.model.startswith("mistral") else Formats()
        return Analytic(Placement(model(self.model), NODE, Parallel(tensor=self.tensor), formats))

    @property
    def steps_s(self) -> tuple[float, float]:
        """(a prefill, a decode) by itself. A first token waits half a decode when one is under way, and every prefill
        of another request holds up the decodes: so these two come out of the two means."""
        decode_s = self.tpot_s * self.output_tokens / (self.output_tokens - self.requests)
        busy = 1 - exp(-self.latency_s * self.rate / self.requests)
        prefill_s = self.ttft_s - busy * decode_s / 2
        return prefill_s, decode_s * (1 - self.rate * prefill_s)


def parsed(row: dict[str, Any]) -> Row:
    found = re.fullmatch(r"(?:(\d)DP)?(\d)TP", row["parallel"])
    assert found
    return Row(
        "llama-3.1-70b" if "/llama" in row["trace"] else "mistral-large-123b",
        int(found[2]),
        int(found[1] or 1),
        row["ttft_s"],
        row["tpot_s"],
        row["engine_prompt_tokens"],
        row["engine_output_tokens"],
        row["sum_of_request_latency_s"],
        row["file"].split("/")[-1].split(".")[0],
    )


ROWS = [parsed(row) for row in SETUP["rows"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_what_the_printed_means_are_means_of(row: Row) -> None:
    """In every file requests x TTFT + tokens x TPOT is the sum of latencies if there were 1024 requests altogether."""
    total_s = row.requests * row.ttft_s + row.output_tokens * row.tpot_s
    assert total_s == pytest.approx(row.latency_s, rel=2e-4)


@cache
def calibrated(name: str) -> tuple[Corrections, Corrections]:
    """Of prefills and of decodes, from the two ends as the published check does: one replica on 2 and on 8 devices.

    Decodes replay graphs and prefills launch every kernel from the host, hence two engines in one.
    """
    prefills, decodes = [], []
    for row in ROWS:
        if row.model == name and is_end(row):
            prompt_tokens, output_tokens = row.lengths
            prefill_s, decode_s = row.steps_s
            prefills.append((row.roofline.estimate(batch_of([(0, prompt_tokens)], 1)), prefill_s))
            half = batch_of([(prompt_tokens + output_tokens // 2, 1)], 1)
            decodes.append((row.roofline.estimate(half), decode_s))
    assert len(decodes) == 2
    return find_corrections(prefills), find_corrections(decodes)


def is_end(row: Row) -> bool:
    return row.copies == 1 and row.tensor in (2, 8)


@cache
def simulated(row: Row) -> tuple[float, float]:
    """(TTFT, TPOT as printed) of the whole share of the trace under vLLM's policies of that time."""
    prefills, decodes = calibrated(row.model)
    cost = Regimes(FewShot(row.roofline, decodes), FewShot(row.roofline, prefills))
    settings = EngineSettings(max_queue_requests=1 << 30, prefix_cache=False, batch="prefill-first")
    capacity = Capacity(20_000, 16, 8192, 32_000, MOST_STEPS)  # memory is far from full
    totals = simulate(poisson(row), Site(settings, capacity, cost, token_budget=8192)).totals
    assert totals.completed == row.requests
    return totals.ttft_s.sum / row.requests, (totals.e2e_s.sum - totals.ttft_s.sum) / totals.output_tokens


def poisson(row: Row) -> Iterator[Arrival]:
    rng, at_s = Random(1), 0.0
    prompt_tokens, output_tokens = row.lengths
    for _ in range(row.requests):
        at_s += rng.expovariate(row.rate)
        yield Arrival(at_s, (Stretch(prompt_tokens),), output_tokens, max_new_tokens=output_tokens)


# Rows that two measurements do not predict within 5 %. The file of one replica on four devices has no format in its
# name: its two halves in fp8 are slower than the whole, so it ran something faster. The quarter waits for fewer other
# requests than the ends, and what an engine of that time spends on every request of a batch is in no term of ours.
MISSES = {"mistral_lmsys_05_validation_4TP": 0.073, "mistral_lmsys_05_validation_4DP2TP_fp8_2": 0.051}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_two_measurements_predict_the_token_times_of_all_deployments(row: Row) -> None:
    """Stated tolerance: 5 %. Calibrated on 2 and 8 devices; 4 devices and every split of the trace are predicted."""
    error = simulated(row)[1] / row.tpot_s - 1
    if row.label in MISSES:
        assert error == pytest.approx(MISSES[row.label], abs=0.005)
    else:
        assert abs(error) < (0.01 if is_end(row) else 0.05)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_and_their_first_tokens(row: Row) -> None:
    assert simulated(row)[0] == pytest.approx(row.ttft_s, rel=0.12)


def test_the_closed_form_of_the_published_check() -> None:
    """TPOT = a W / (devices x 3.35 TB/s) + b through the means on 2 and 8 devices gives 20.3 ms on 4."""
    check = SETUP["calibration_check"]
    weights = 2 * model("llama-3.1-70b").weights
    assert weights / 1e9 == pytest.approx(check["weights_GB"], rel=1e-4)
    whole = {row.tensor: row.tpot_s for row in ROWS if row.copies == 1 and row.model == "llama-3.1-70b"}
    read_s = {devices: weights / devices / device("H100-SXM").memory_bytes_per_s for devices in whole}
    a = (whole[2] - whole[8]) / (read_s[2] - read_s[8])
    b = whole[8] - a * read_s[8]
    assert a == pytest.approx(check["a"], rel=1e-3) and b * 1e3 == pytest.approx(check["b_ms"], rel=2e-3)
    assert (a * read_s[4] + b) * 1e3 == pytest.approx(check["pred_4TP_ms"], rel=2e-3)
    assert whole[4] * 1e3 == pytest.approx(check["meas_4TP_ms"], abs=1e-4)
    assert a * read_s[4] + b == pytest.approx(whole[4], rel=0.05)


@pytest.mark.parametrize("row", [row for row in ROWS if row.model == "llama-3.1-70b"], ids=lambda row: row.label)
def test_the_roofline_alone_misses_what_the_host_spends(row: Row) -> None:
    """Nothing fitted: what is missing is about 5 ms a decode whatever the plan, the host's work in vLLM 0.6.0."""
    half = batch_of([(row.lengths[0] + row.lengths[1] // 2, 1)], 1)
    missing_s = row.steps_s[1] - row.roofline.estimate(half).seconds
    assert missing_s == pytest.approx(5.0e-3, abs=0.6e-3)


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
