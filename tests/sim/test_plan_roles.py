"""DistServe's placement of OPT-13B re-derived with the coefficients of its artifact, and what the metric decides."""

from __future__ import annotations

from functools import cache

import pytest

from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.sim.claims.setting import exactly, log_normal, patient, poisson, requests
from headrace.sim.cost.batch import batch_of
from headrace.sim.cost.distserve import OPT_13B
from headrace.sim.executor import MOST_STEPS
from headrace.sim.hardware import Link, link
from headrace.sim.models import model
from headrace.sim.plan.roles import Life, Promise, Pulled, goodput, separated
from headrace.sim.run import Site

ASKED = requests(log_normal((458, 1650), (121, 437), 2048), 150, exactly)
KV_BYTES = 2 * 40 * 5120 * 2
NVLINK = link("nvlink3")


def site(tensor: int) -> Site:
    cost, kv_tokens = OPT_13B[tensor]
    settings = patient(EngineSettings(batch="prefill-first", token_budget=8192, max_running=256, prefix_cache=False))
    return Site(settings, Capacity(kv_tokens // 16, 16, 4096, 50_272, MOST_STEPS), cost, token_budget=8192)


def lives(prefill: int, decode: int, rate: float, over: Link = NVLINK) -> list[Life]:
    return separated(poisson(ASKED, rate), site(prefill), site(decode), over, KV_BYTES)


@cache
def per_device(prefill: int, decode: int, ttft_s: float, longest: bool = False) -> float:
    promise = Promise(ttft_s, 0.1, longest=longest)
    return goodput(lambda rate: lives(prefill, decode, rate), promise, len(ASKED)) / (prefill + decode)


def test_the_kv_of_a_token_is_that_of_the_shape() -> None:
    shape = model("opt-13b")
    assert 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 == KV_BYTES


def test_the_published_placement_wins() -> None:
    """Prefill on two devices, decode on one, under 200 and 100 ms for nine of ten."""
    found = {(p, d): per_device(p, d, 0.2) for p in (1, 2) for d in (1, 2)}
    assert max(found, key=found.__getitem__) == (2, 1)
    assert found[2, 1] > 2 * found[1, 1]


def test_kv_takes_the_time_of_its_link() -> None:
    """Over a network of 25 Gbit/s the way of the KV is what decoding waits for."""
    near, far = lives(2, 1, 2.0), lives(2, 1, 2.0, Link("25GbE", 25e9 / 8, 1e-5))
    assert [one.ttft_s for one in near] == [one.ttft_s for one in far]
    assert sum(one.longest_s for one in far) > sum(one.longest_s for one in near) + 0.1 * len(far)


def test_every_request_ends_once_and_in_order() -> None:
    found = lives(1, 1, 1.0)
    assert len(found) == len(ASKED)
    assert all(one.ttft_s > 0 and one.tpot_s >= 0 and one.longest_s >= 0 for one in found)


def test_prompts_that_were_pulled_cost_a_decode_row() -> None:
    cost, _ = OPT_13B[1]
    pulled = Pulled(cost).estimate(batch_of([(0, 500), (700, 1)], 2))
    assert pulled.seconds == pytest.approx(cost.estimate(batch_of([(499, 1), (700, 1)], 2)).seconds)


def test_a_promise_counts_each_part_by_itself() -> None:
    some = [Life(0.1, 0.05, 0.5)] * 9 + [Life(9.0, 0.05, 0.5)]
    assert Promise(0.2, 0.1).kept(some, 10)
    assert not Promise(0.2, 0.1).kept(some, 11)
    assert not Promise(0.2, 0.1, longest=True).kept(some, 10)
