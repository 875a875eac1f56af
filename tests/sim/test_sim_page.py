"""The page: well formed, with nothing from outside, and every part of it there."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from headrace.core.config import EngineSettings
from headrace.sim.page import page
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.sweep import answer, curve
from headrace.sim.workers import here
from headrace.workload.settings import WorkloadSettings

VOID = {"meta", "br", "link", "img"}


class Checked(HTMLParser):
    """Every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def asked(slo: str | None, arrivals: str = "poisson:6") -> Scenario:
    traffic = WorkloadSettings(arrivals=arrivals, requests=60, slo=slo)
    return Scenario(SimulateSettings(model="llama-3.1-8b", hardware="A10G"), EngineSettings(), (traffic,))


@pytest.mark.parametrize("slo", [None, "ttft=0.5,tpot=0.1"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_page_is_well_formed_and_self_contained(slo: str | None, count: int) -> None:
    scenario = asked(slo)
    report = answer(scenario)
    loads = curve(scenario, [2.0, 8.0], here) if count == 1 else ()
    text = page([(f"<run {number}>", scenario, report) for number in range(count)], loads)
    checked = Checked()
    checked.feed(text)
    assert not checked.open
    assert "script" not in checked.seen
    assert not re.search(r"(?:src|href)\s*=|https?://(?!www\.w3\.org)", text)
    for title in ("Latency distributions", "Over time", "What the steps spend their time on", "Requests over time"):
        assert title in text
    assert ("Over load" in text) == bool(loads)
    assert ("Goodput" in text) == bool(loads and slo)
    assert "<run" not in text
    assert text.count("prompt tokens, ") >= 60


def test_nobody_came() -> None:
    scenario = asked(None, "closed:2")
    report = answer(scenario)
    report.totals = type(report.totals)()
    assert "no values" in page([("empty", scenario, report)])
