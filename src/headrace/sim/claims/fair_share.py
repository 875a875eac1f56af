"""Fair shares among tenants: the virtual token counter (Sheng et al., OSDI 2024) and deficit round robin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from headrace.core.config import EngineSettings
from headrace.core.events import Admitted, Arrived, Decoded, Drew, Event, Finished
from headrace.core.types import RequestId
from headrace.sim.claims.claim import Band, Claim, Number
from headrace.sim.claims.setting import ask, device
from headrace.sim.settings import SimulateSettings
from headrace.workload.arrival import Arrival, Stretch
from headrace.workload.streams import merge

KV_TOKENS = 10_000
PROMPT = OUTPUT = 256
PROMPT_COST, OUTPUT_COST = 1, 2
SPAN_S = 120.0  # while both ask for more than their share
RATES: Mapping[str, float] = {"one": 240 / 60, "two": 480 / 60}  # requests per second
QUANTUM = 512  # of `engine.policies.fairness`
BOUND = 2 * max(PROMPT_COST * PROMPT, OUTPUT_COST * KV_TOKENS)  # theorem 4.4
_LLAMA = device(SimulateSettings(model="llama-2-7b", hardware="A10G"), KV_TOKENS)


@dataclass(slots=True)
class Served:
    """The cost of what each tenant was served, and the largest difference between two of them until `until_s`."""

    until_s: float
    cost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RATES, 0))
    largest: int = 0
    _of: dict[RequestId, tuple[str, int]] = field(default_factory=dict)

    def observe(self, event: Event) -> None:
        if event.at_s > self.until_s:
            return
        match event:
            case Arrived() if event.request:
                self._of[event.request_id] = event.request.tenant, event.prompt_tokens
            case Admitted() if not event.again:
                tenant, prompt = self._of[event.request_id]
                self.cost[tenant] += prompt * PROMPT_COST
            case Drew():
                for name, tokens in zip(event.request_ids, event.tokens, strict=True):
                    self._drew(name, tokens)
            case Decoded():
                for row in event.rows:
                    self._drew(row.request_id, event.run.steps)
            case Finished():
                self._of.pop(event.request_id, None)
        self.largest = max(self.largest, max(self.cost.values()) - min(self.cost.values()))

    def _drew(self, name: RequestId, tokens: int) -> None:
        if name in self._of:
            self.cost[self._of[name][0]] += tokens * OUTPUT_COST


def _arrivals() -> list[Arrival]:
    """Two tenants, evenly spaced, each with more than it will get."""
    one = Arrival(0.0, (Stretch(PROMPT),), OUTPUT, max_new_tokens=OUTPUT)
    streams = (
        [replace(one, at_s=at / rate, tenant=tenant) for at in range(int(SPAN_S * rate))]
        for tenant, rate in RATES.items()
    )
    return list(merge(*streams))


def _served(ordering: str) -> tuple[Served, float]:
    """What was served while both asked, and tokens per second until all were done."""
    settings = EngineSettings(ordering=ordering, token_budget=2048, prefix_cache=False)
    served = Served(SPAN_S)
    totals = ask(_LLAMA(settings), _arrivals(), served)
    return served, totals.output_tokens / totals.span_s


def _counters() -> tuple[float, ...]:
    (fair, fair_rate), (first, first_rate) = _served("vtc"), _served("fcfs")
    return fair.largest, first.largest, fair_rate / first_rate, fair.cost["one"], fair.cost["two"]


def _deficits() -> tuple[float, ...]:
    fair, _ = _served("drr")
    return fair.largest, fair.cost["one"] / fair.cost["two"], fair.cost["one"], fair.cost["two"]


_SETTING = (
    f"llama-2-7b on an A10G with {KV_TOKENS:,} tokens of KV; two tenants send {60 * RATES['one']:.0f} and "
    f"{60 * RATES['two']:.0f} requests a minute of {PROMPT} and {OUTPUT} tokens for {SPAN_S:.0f} s, each more than "
    f"half of what the device can do; a prompt token costs {PROMPT_COST}, an output token {OUTPUT_COST}"
)
_FAIR = "Rates above the paper's 90 and 180: both must overload the modelled A10G, which is faster than theirs."
_TOKENS = "{:,.0f}"

CLAIMS = (
    Claim(
        name="vtc-bound",
        system="VTC",
        paper="Sheng et al., Fairness in Serving Large Language Models, OSDI 2024",
        says="Between two tenants that always wait, service differs by at most 2 max(w_p L, w_q M) at any time, at "
        "no cost of throughput; first come, first served has no bound.",
        source="theorem 4.4 and section 5.2",
        setting=f"{_SETTING}; ordering `vtc` against `fcfs`.",
        fair=_FAIR,
        numbers=(
            Number("largest difference of service, VTC", BOUND, Band(high=BOUND), Band(high=BOUND), _TOKENS),
            Number("largest difference of service, FCFS", None, Band(BOUND), Band(BOUND), _TOKENS),
            Number("throughput until all are done, VTC over FCFS", 1.0, Band(0.97, 1.03), Band(0.9, 1.1)),
            Number("served to one", form=_TOKENS),
            Number("served to two", form=_TOKENS),
        ),
        obtain=_counters,
        because=(
            "A worst case: the bound is far above what happens unless one tenant's requests fill all memory.",
            "How far FCFS goes is the length of the run; it grows by a third of all service as long as it lasts.",
            "Throughput within a window is no measure: under VTC who was preempted lets others start first, so that "
            "in the first two minutes more is begun (15 % more service) and less finished (7 % fewer tokens of whole "
            "answers).",
            "A preempted request's tokens are charged once, whatever is computed again.",
        ),
    ),
    Claim(
        name="drr-bound",
        system="Deficit round robin",
        paper="Shreedhar and Varghese, Efficient Fair Queueing Using Deficit Round Robin, SIGCOMM 1995",
        says="Between two flows that always wait, service differs by at most 2 Max + Q, with Max the largest packet "
        "and Q the quantum.",
        source="the fairness measure of the paper, carried over: a packet is a request with all it will draw",
        setting=f"{_SETTING}; ordering `drr`, quantum {QUANTUM}.",
        fair=_FAIR,
        numbers=(
            Number(
                "largest difference of service",
                float(2 * (PROMPT_COST * PROMPT + OUTPUT_COST * OUTPUT) + QUANTUM),
                Band(high=2 * (PROMPT_COST * PROMPT + OUTPUT_COST * OUTPUT) + QUANTUM),
                Band(high=BOUND),
                _TOKENS,
            ),
            Number("service of one over two", 1.0, Band(0.95, 1.05), Band(0.8, 1.25)),
            Number("served to one", form=_TOKENS),
            Number("served to two", form=_TOKENS),
        ),
        obtain=_deficits,
        because=(
            "A router knows a packet's size when it sends it. Here most of the cost is drawn after the start, so as "
            "many requests as memory holds start on credit before the first is paid for.",
        ),
    ),
)
