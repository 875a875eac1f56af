"""DistServe's placement of OPT-13B re-derived with the coefficients of its artifact, what the metric decides, and what
holds of every hand-off."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.core import clock
from headrace.core.config import BadSetting, EngineSettings
from headrace.core.ports import Capacity
from headrace.core.shape import KV_BF16
from headrace.sim.claims.setting import exactly, log_normal, patient, poisson, requests
from headrace.sim.cost.batch import batch_of
from headrace.sim.cost.distserve import OPT_13B
from headrace.sim.executor import MOST_STEPS
from headrace.sim.handoff import Apart, Handoff, Life, Pulled, lives_apart
from headrace.sim.hardware import Link, link
from headrace.sim.models import model
from headrace.sim.plan.pools import NoFleet
from headrace.sim.plan.roles import (
    Instance,
    Phase,
    Promise,
    Roles,
    at_rate,
    best,
    decode_rate,
    goodput,
    prefill_rate,
    roles,
)
from headrace.sim.plan.roles_told import answer
from headrace.sim.run import Site
from headrace.workload.arrival import Arrival, Stretch

ASKED = poisson(requests(log_normal((458, 1650), (121, 437), 2048), 150, exactly), 1.0)
KV_BYTES = KV_BF16.bytes_per_token(model("opt-13b"))
NVLINK = link("nvlink3")


def site(tensor: int, batch: str = "prefill-first", budget: int = 8192) -> Site:
    cost, kv_tokens = OPT_13B[tensor]
    settings = patient(EngineSettings(batch=batch, token_budget=budget, max_running=256, prefix_cache=False))
    return Site(settings, Capacity(kv_tokens // 16, 16, 4096, 50_272, MOST_STEPS), cost, token_budget=budget)


def instance(tensor: int, over: Link = NVLINK) -> Instance:
    one = site(tensor)
    return Instance(tensor, one, one, (one, site(tensor, "chunked", 256)), over, KV_BYTES / tensor)


def apart(prefill: int, decode: int, over: Link = NVLINK) -> Apart:
    return Apart(site(prefill), site(decode), over, KV_BYTES)


def test_the_kv_of_a_token_is_that_of_the_shape() -> None:
    assert KV_BYTES == 2 * 40 * 5120 * 2


def test_the_published_placement_comes_out() -> None:
    """Prefill on two devices, decode on one, under 200 and 100 ms for nine of ten (DistServe, section 6)."""
    promise, phases = Promise(0.2, 0.1), []
    for ways in (1, 2):
        one = instance(ways)
        phases += [
            Phase("prefill", ways, (prefill_rate(ASKED, one, promise),)),
            Phase("decode", ways, (decode_rate(ASKED, one, promise),)),
        ]
    by = {(one.role, one.devices): one.per_device(0) for one in phases}
    assert by["prefill", 2] > 2 * by["prefill", 1] and by["decode", 1] > by["decode", 2]
    chosen = [best(phases, role) for role in ("prefill", "decode")]
    assert [one.devices for one in chosen if one] == [2, 1]


def test_the_metric_decides_whether_it_pays() -> None:
    """By the mean time of a token one replica for both does more per device; by the longest pause of each request,
    where prompts that come first interrupt it, what it gains is lost."""
    found = roles(ASKED[:100], [instance(1)], Promise(0.4, 0.06), rate=20.0)
    mean, longest = found.pays
    assert mean < 0.95 and longest > 1.1 * mean
    assert found.apart is not None and found.needed is not None and found.slow_link is not None
    prefills, decodes = found.needed
    assert prefills * found.apart.prefill.rates[0] >= 20 <= decodes * found.apart.decode.rates[0]
    assert found.slow_link <= found.apart.per_device(0)
    told = answer(found, "OPT-13B", None)
    assert told.headline[0].startswith(("APART", "TOGETHER"))
    assert len(told.parts[0].rows) == 4 and told.numbers["instances_for_rate"] == found.needed


def test_kv_takes_the_time_of_its_link() -> None:
    """Over a network of 25 Gbit/s the way of the KV is what decoding waits for."""
    rows = at_rate(ASKED, 2.0)
    near, far = (lives_apart(rows, apart(2, 1, over)) for over in (NVLINK, Link("25GbE", 25e9 / 8, 1e-5)))
    assert sorted(one.ttft_s for one in near) == pytest.approx(sorted(one.ttft_s for one in far))
    assert sum(one.longest_s for one in far) > sum(one.longest_s for one in near) + 0.1 * len(far)


def test_a_full_prefill_replica_stops_until_its_kv_was_pulled() -> None:
    """A link so slow that KV piles up: prompts wait at the door, and nobody holds more than there is."""
    tight = replace(site(1), capacity=replace(site(1).capacity, blocks=300))
    run = Handoff(at_rate(ASKED, 4.0), Apart(tight, site(1), Link("slow", 2e9, 0.0), KV_BYTES))
    lives = clock.run(run.run(), virtual=True)
    run.check()
    assert len(lives) == len(ASKED)
    assert 250 < run.most_held <= 300
    roomy = lives_apart(at_rate(ASKED, 4.0), Apart(site(1), site(1), Link("slow", 2e9, 0.0), KV_BYTES))
    assert sum(one.ttft_s for one in lives) > 1.5 * sum(one.ttft_s for one in roomy)


@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 700), st.integers(1, 40)), min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1e8, 1e10, 1e12]),
    st.integers(30, 80),
)
@bounded(max_examples=25, derandomize=True, deadline=None)
def test_every_request_ends_once_or_is_refused(
    asked: list[tuple[float, int, int]], prefills: int, decodes: int, pace: float, blocks: int
) -> None:
    small = replace(site(1), capacity=replace(site(1).capacity, blocks=blocks))
    there = Apart(replace(small, replicas=prefills), replace(small, replicas=decodes), Link("l", pace, 1e-6), KV_BYTES)
    rows, at_s = [], 0.0
    for gap_s, prompt, output in asked:
        at_s += gap_s
        rows.append(Arrival(at_s, (Stretch(prompt),), output, max_new_tokens=output))
    run = Handoff(rows, there)
    lives = clock.run(run.run(), virtual=True)
    run.check()
    fitting = sum(row.prompt_tokens + row.output_tokens <= 16 * blocks - 32 for row in rows)
    assert fitting <= len(lives) <= len(rows)
    assert all(one.ttft_s > 0 and one.tpot_s >= 0 and one.longest_s >= one.tpot_s - 1e-9 for one in lives)


def test_prompts_that_were_pulled_cost_a_decode_row() -> None:
    cost, _ = OPT_13B[1]
    pulled = Pulled(cost).estimate(batch_of([(0, 500), (700, 1)], 2))
    assert pulled.seconds == pytest.approx(cost.estimate(batch_of([(499, 1), (700, 1)], 2)).seconds)


def test_a_promise_counts_each_part_by_itself() -> None:
    some = [Life(0.1, 0.05, 0.5)] * 9 + [Life(9.0, 0.05, 0.5)]
    assert Promise(0.2, 0.1).kept(some, 10)
    assert not Promise(0.2, 0.1).kept(some, 11)
    assert not Promise(0.2, 0.1, longest=True).kept(some, 10)


@given(st.floats(0.07, 60.0))
@bounded(max_examples=40, derandomize=True, deadline=None)
def test_goodput_finds_the_edge(edge: float) -> None:
    assert edge / 1.05 <= goodput(lambda rate: rate <= edge) <= edge


def test_what_cannot_be_promised_is_said() -> None:
    assert goodput(lambda rate: False) == 0.0
    with pytest.raises(NoFleet, match="without any queue"):
        roles(ASKED[:20], [instance(1)], Promise(0.001, 0.001))
    with pytest.raises(BadSetting, match="arrivals"):
        at_rate([Arrival(None, (Stretch(9),), 3)], 1.0)


def test_what_holds_at_every_rate_is_said() -> None:
    """It is the end of the search, and no goodput."""
    most = goodput(lambda rate: True)
    for rate, endless in ((most, True), (most / 2, False)):
        both = Phase("both", 1, (rate, rate))
        found = Roles(Promise(1.0, 1.0), (both,), None, None, None, None, both)
        assert found.endless is endless
        assert any("NOT TO BE RELIED ON" in line for line in answer(found, "x", None).sure) is endless
