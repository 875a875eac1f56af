"""Work on a Ray cluster: one is started here, and gives what other processes give."""

from __future__ import annotations

import pytest

from headrace.cluster.ray import NoCluster, on_ray
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.sweep import answer, answers
from headrace.workload.settings import WorkloadSettings


def test_a_cluster_answers_as_this_process_does() -> None:
    scenario = Scenario(traffic=(WorkloadSettings(requests=40),))
    other = Scenario(SimulateSettings(hardware="A10G"), traffic=(WorkloadSettings(requests=30),))
    reports = answers([scenario, other], on_ray("local"))
    assert [report.digest for report in reports] == [answer(scenario).digest, answer(other).digest]
    with pytest.raises(NoCluster, match="did you mean"):
        answers([Scenario(SimulateSettings(hardware="H1000"))], on_ray("local"))
