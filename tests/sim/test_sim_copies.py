"""What copies between the tiers cost in virtual time; many steps at once come out as one by one beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sim_rig import Linear, Watched, traffic

from headrace.core.config import Bytes, EngineSettings
from headrace.core.ports import Capacity
from headrace.core.step import DEVICE, HOST, Copy, StepPlan, Work
from headrace.sim.cost.copies import HostLink
from headrace.sim.hardware import Link
from headrace.sim.run import simulate
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.workload.arrival import Arrival, Stretch
from headrace.workload.settings import WorkloadSettings

ROAD = HostLink(Link("road", 1e9, 1e-3), block_bytes=1e6, launches=4, launch_s=0.01)
OUT = Copy(DEVICE, HOST, ((9, 0), (4, 1), (5, 3)))  # two runs of neighbours on the host
IN = Copy(HOST, DEVICE, ((6, 2), (7, 3)))


def plan(new_block: int = 2) -> StepPlan:
    return StepPlan(0, (Work("a", 0, 1, True, (new_block,)),), copies=(OUT, IN))


def test_a_copy_costs_its_groups_its_bytes_and_the_latency() -> None:
    assert ROAD.seconds([OUT]) == pytest.approx(0.001 + 2 * 4 * 0.01 + 3e-3)
    assert ROAD.seconds([IN]) == pytest.approx(0.001 + 4 * 0.01 + 2e-3)
    assert replace(ROAD, in_groups=False).seconds([OUT]) == pytest.approx(0.001 + 3 * 4 * 0.01 + 3e-3)


def test_copies_hide_behind_work_that_does_not_wait_for_them() -> None:
    out_s, in_s = ROAD.seconds([OUT]), ROAD.seconds([IN])
    assert ROAD.step_s(plan(), 1.0) == 1.0
    assert ROAD.step_s(plan(), 0.01) == pytest.approx(out_s + in_s)
    assert ROAD.step_s(plan(new_block=4), 1.0) == pytest.approx(1.0 + out_s)
    assert replace(ROAD, beside_work=False).step_s(plan(), 1.0) == pytest.approx(1.0 + out_s + in_s)


TIERED = Capacity(40, 4, 160, 50, 1 << 20, host_blocks=300)
QUICK = HostLink(Link("road", 1e9, 1e-5), block_bytes=1e5, launches=4)


def watched(capacity: Capacity, **settings: object) -> Watched:
    chosen = EngineSettings(block_tokens=4, preemption="swap", max_running=8, **settings)  # type: ignore[arg-type]
    rig = Watched(chosen, capacity, cost=Linear(), host=QUICK)
    return rig.run(traffic(3, 120, 60.0, cancels=0.1))


@pytest.mark.parametrize("ordering", ["fcfs", "markov", "priority", "vtc"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_many_steps_at_once_beside_copies(ordering: str, prefix_cache: bool) -> None:
    chosen = {"ordering": ordering, "prefix_cache": prefix_cache}
    many, one_by_one = watched(TIERED, **chosen), watched(replace(TIERED, steps=1), **chosen)
    assert many.story() == one_by_one.story()
    assert many.blocks() == one_by_one.blocks()
    assert [one.copies for one in many.plans if one.copies] == [one.copies for one in one_by_one.plans if one.copies]
    for name, times in many.token_s.items():
        assert times == pytest.approx(one_by_one.token_s[name])
    assert {copy.target_tier for one in many.plans for copy in one.copies} == {DEVICE, HOST}
    spent = many.stats.totals.spent
    assert spent.copied_bytes == 1e5 * sum(len(copy.pairs) for one in many.plans for copy in one.copies)
    assert "copy" in spent.shares()


def turns(sessions: int) -> list[Arrival]:
    """Two turns each, the second after everybody's first."""
    first = [Arrival(float(at), (Stretch(1500, at + 1),), 40, session=str(at)) for at in range(sessions)]
    return first + [
        Arrival(
            200.0 + one.at_s,  # type: ignore[operator]
            (*one.prompt, Stretch(40, 9000 + at, answer=True), Stretch(20, 5000 + at)),
            40,
            session=str(at),
            turn=1,
            gap_s=1.0,
        )
        for at, one in enumerate(first)
    ]


def test_a_host_tier_brings_the_second_turns_of_more_conversations_than_the_device_holds() -> None:
    def asked(host: int) -> Scenario:
        return Scenario(SimulateSettings("llama-3-8b", "A10G"), EngineSettings(host_kv_memory=Bytes(host)))

    with_tier, without = (simulate(turns(60), asked(host).site()).totals for host in (16 << 30, 0))
    assert with_tier.cached_tokens > 60 * 1500 > 2.5 * without.cached_tokens
    assert (with_tier.ttft_s.quantile(0.25) or 0) < 0.3 * (without.ttft_s.quantile(0.25) or 0)
    assert without.spent.copied_bytes == 0 < with_tier.spent.copied_bytes


def test_a_site_has_the_tier_that_was_asked_for() -> None:
    engine = EngineSettings(host_kv_memory=Bytes(8 << 30))
    site = Scenario(SimulateSettings("llama-3-8b", "A10G"), engine).site()
    assert site.capacity.host_blocks == (8 << 30) // (16 * 131072)
    assert site.host is not None and site.host.launches == 64
    assert site.capacity.least_copied_blocks == 1  # a block takes longer to compute than 64 launches and 2 MiB
    two = Scenario(SimulateSettings("llama-3-8b", "2xA10G"), engine).site()
    assert two.capacity.host_blocks == site.capacity.host_blocks
    assert two.host is not None and two.host.block_bytes == site.host.block_bytes / 2
    asked = Scenario(SimulateSettings("llama-3-8b", "A10G"), engine, (WorkloadSettings(),))
    assert Scenario.from_json(asked.to_json()) == asked
