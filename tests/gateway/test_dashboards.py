"""The dashboard and the alarms ask for metrics that exist, and every alarm says what it means and what to do."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import yaml
from gateway_rig import RoteService, ask, make_text

from headrace.core.config import GatewaySettings
from headrace.core.events import Drew, Finished
from headrace.core.metrics import Metrics
from headrace.core.types import FinishReason, Usage
from headrace.gateway.app import build

FOLDER = Path(__file__).parent.parent.parent / "dashboards"
BOARD = json.loads((FOLDER / "headrace.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"headrace:\w+", text))


def exposed() -> set[str]:
    """Every name of a sample that /metrics has once a request has ended."""
    metrics = Metrics()
    metrics.observe(Drew(1.0, ("a",), (1,), ("a",)))
    metrics.observe(Finished(2.0, "a", FinishReason.STOP, Usage(1, 1, 0), 0.0, 0.5, 1.0, 4))
    app = build(RoteService(), make_text(), GatewaySettings(), metrics)
    _, _, body = asyncio.run(ask(app, "/metrics", method="GET"))
    return {re.split(r"[{ ]", line)[0] for line in body.decode().splitlines() if not line.startswith("#")}


def test_every_metric_that_the_dashboard_and_the_alarms_ask_for_exists() -> None:
    panels: list[dict[str, Any]] = BOARD["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in names_in(target["expr"])}
    asked |= names_in(json.dumps(BOARD["templating"])) | {name for rule in RULES for name in names_in(rule["expr"])}
    assert len(asked) > 20 and asked <= exposed(), asked - exposed()


def test_panels_have_a_place_a_unit_and_a_sentence() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in BOARD["panels"]}) == len(places)
    for panel in BOARD["panels"]:
        assert panel["title"] and panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_alarm_says_what_it_means_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["alert"].startswith("Headrace") and rule["for"] and rule["labels"]["severity"] in ("page", "ticket")
        assert all(rule["annotations"][part].endswith(".") for part in ("summary", "meaning", "action"))
