"""HexGen-Flow (Peng et al., 2025): the call with the least slack goes first, so that whole queries end in time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from headrace.core.config import EngineSettings
from headrace.core.events import Arrived, Event, Finished
from headrace.core.types import SLO, RequestId
from headrace.sim.claims.claim import MORE, Claim, Number, times
from headrace.sim.claims.setting import Lengths, ask, device, exactly, highest, log_normal, poisson, requests
from headrace.sim.settings import SimulateSettings
from headrace.workload.arrival import Arrival

PAPER = "Peng et al., HEXGEN-TEXT2SQL, arXiv:2505.05286"
STAGES: tuple[tuple[Lengths, float], ...] = (  # lengths of a call, and seconds it may take
    (log_normal((3000, 5000), (120, 240), 8192), 20.0),  # which tables: a schema is long, the answer short
    (log_normal((1500, 2500), (300, 600), 8192), 40.0),  # write the query
    (log_normal((1000, 2000), (150, 300), 8192), 60.0),  # mend what did not run
    (log_normal((800, 1200), (20, 40), 8192), 80.0),  # choose one
)
CALLS = 600
ATTAIN = 0.9
_NODE = device(SimulateSettings(model="llama-3.1-70b", hardware="4xA100-80GB"))


@dataclass(slots=True)
class InTime:
    """How many ended when they were due. The SLO's TTFT stands for the whole call: answers come at once."""

    good: int = 0
    _due_s: dict[RequestId, float] = field(default_factory=dict)

    def observe(self, event: Event) -> None:
        if type(event) is Arrived and event.request and event.request.slo:
            self._due_s[event.request_id] = event.at_s + (event.request.slo.ttft_s or 0.0)
        elif type(event) is Finished:
            self.good += event.at_s <= self._due_s.pop(event.request_id)


def _calls() -> list[Arrival]:
    """As many of each stage, shuffled."""
    calls = []
    for seed, (lengths, within_s) in enumerate(STAGES):
        some = requests(lengths, CALLS // len(STAGES), exactly, seed)
        calls += [replace(one, slo=SLO(ttft_s=within_s)) for one in some]
    Random(0).shuffle(calls)
    return calls


def _rate(ordering: str) -> float:
    """The most calls a second of which nine of ten end in time."""
    calls = _calls()
    site = _NODE(EngineSettings(ordering=ordering, token_budget=1024, max_running=32, prefix_cache=False))

    def holds(rate: float) -> bool:
        in_time = InTime()
        ask(site, poisson(calls, rate), in_time)
        return in_time.good >= ATTAIN * CALLS

    return highest(holds, 0.2, 20.0)


def _obtain() -> tuple[float, ...]:
    urgent, first = _rate("urgency"), _rate("fcfs")
    return urgent / first, urgent, first


CLAIMS = (
    Claim(
        name="hexgen-urgency",
        system="HexGen-Flow",
        paper=PAPER,
        says="Dispatch by work and urgency in the queue serve 1.65 times the load of vLLM at equal deadlines.",
        source="abstract",
        setting="llama-3.1-70b on 4xA100-80GB, 32 at once; calls of four stages of text-to-SQL with 20 to 80 s each; "
        f"highest Poisson rate of which {ATTAIN:.0%} end when they are due: ordering `urgency` against `fcfs`.",
        fair="The queue alone: one replica, so nothing is dispatched. 600 calls, lengths of the stages guessed.",
        numbers=(
            Number("load, urgency over first come, first served", 1.65, times(1.65, 1.25), MORE, "{:.2f}x"),
            Number("urgency", form="{:.2f} requests/s"),
            Number("first come, first served", form="{:.2f} requests/s"),
        ),
        obtain=_obtain,
        because=(
            "The lengths of its stages cannot be known: its traces carry no licence and were not read.",
            "Its gain comes from three parts; dispatch among unlike devices and budgets that move from stage to "
            "stage need a fleet.",
            "At the highest rate that holds hardly anybody waits for long, so the order of the queue decides little.",
        ),
    ),
)
