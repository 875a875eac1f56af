"""The plan file: TOML of the settings that `headrace simulate --plan` and `headrace serve --plan` read. Values only."""

from __future__ import annotations

import json
from collections.abc import Sequence

from headrace.core.config import EngineSettings
from headrace.sim.plan.answer import section
from headrace.sim.scenario import Scenario


def plan_file(scenario: Scenario, comments: Sequence[str]) -> str:
    """All of a scenario that is not as usual; comments say where it comes from."""
    lines = [f"# {line.strip()}" for line in ("Written by `headrace plan`.", *comments)]
    lines += section("simulate", scenario.simulate, ("model", "hardware", "replicas"))
    lines += section("engine", scenario.engine) if scenario.engine != EngineSettings() else []
    for part in scenario.traffic:
        name = "workload" if len(scenario.traffic) == 1 else f"workload.{json.dumps(part.tenant)}"
        lines += section(name, part, ("lengths",))
    return "\n".join(lines) + "\n"
