"""FlexLLM (Oliaro et al., 2024): fine-tuning fills what inference leaves of every step, instead of its own devices."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.config import EngineSettings
from headrace.core.events import Event, StepDone
from headrace.engine.policy import PRIORITY_LEVELS
from headrace.sim.claims.claim import MORE, Band, Claim, Number
from headrace.sim.claims.setting import ask, device, exactly, poisson, requests
from headrace.sim.cost.batch import batch_of
from headrace.sim.run import Site
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals
from headrace.workload.arrival import Arrival, Stretch
from headrace.workload.laws import parse_pairs
from headrace.workload.streams import merge

PAPER = "Oliaro et al., FlexLLM: Token-Level Co-Serving of LLM Inference and Finetuning, arXiv:2402.18789"
DEVICES = 4
TRAIN = 8192  # tokens of a training sequence
PASSES = 3  # a backward pass costs as much as two forward passes, wherever it runs
ITL_S = 0.05
SPAN_S = 60.0
BACKLOG = 200  # training sequences: more than a device computes in the span
RATES = (4.0, 12.0)  # requests a second of the whole cluster: light, heavy
_LLAMA = device(SimulateSettings(model="llama-3.1-8b", hardware="A100-80GB"))


def _site(batch: str) -> Site:
    return _LLAMA(EngineSettings(batch=batch, inter_token_ms=1e3 * ITL_S, prefix_cache=False))


def _chat(rate: float) -> list[Arrival]:
    return poisson(requests(parse_pairs("sharegpt"), round(rate * SPAN_S), exactly), rate)


def _filler(count: int) -> list[Arrival]:
    """Training sequences as requests that nobody waits for."""
    return [Arrival(0.0, (Stretch(TRAIN),), 1, max_new_tokens=1, priority=-PRIORITY_LEVELS, cancel_s=SPAN_S)] * count


@dataclass(slots=True)
class Computed:
    """Tokens that were computed in the first `until_s` seconds."""

    until_s: float
    tokens: int = 0

    def observe(self, event: Event) -> None:
        if type(event) is StepDone and event.at_s <= self.until_s:
            self.tokens += event.tokens * event.run.steps


def _together(rate: float) -> tuple[float, float]:
    """(tokens of training a second, p99 of the time between tokens) of the cluster, each device serving its part."""
    served, both = Computed(SPAN_S), Computed(SPAN_S)
    site = _site("filling")
    ask(site, _chat(rate / DEVICES), served)
    totals = ask(site, merge(_chat(rate / DEVICES), _filler(BACKLOG)), both)
    training = DEVICES * (both.tokens - served.tokens) / SPAN_S / PASSES
    return training, _itl_s(totals)


def _apart(rate: float) -> tuple[float, float]:
    """The same with half of the devices for training, which takes the largest steps there are."""
    half = DEVICES // 2
    totals = ask(_site("chunked"), _chat(rate / half))
    cost = _site("chunked").cost.estimate(batch_of([(0, TRAIN)], 1))
    return half * TRAIN / cost.seconds / PASSES, _itl_s(totals)


def _itl_s(totals: Totals) -> float:
    return totals.itl_s.quantile(0.99) or 0.0


def _obtain() -> tuple[float, ...]:
    (light, light_s), (heavy, heavy_s) = map(_together, RATES)
    (apart, _), (_, apart_s) = map(_apart, RATES)
    return light / apart, heavy / apart, 1e3 * max(light_s, heavy_s), 1e3 * apart_s, light, heavy, apart


CLAIMS = (
    Claim(
        name="flexllm-coserving",
        system="FlexLLM",
        paper=PAPER,
        says="Co-serving trains 2.5 to 6.8 times as fast under light and 1.9 to 4.8 times under heavy load as a "
        "cluster that is split between inference and fine-tuning, and keeps the SLO.",
        source="abstract of version 2",
        setting=f"llama-3.1-8b on {DEVICES} A100-80GB, ShareGPT at {RATES[0]:g} and {RATES[1]:g} requests a second, "
        f"training sequences of {TRAIN:,} tokens; batch `filling` on all devices against `chunked` on half of them "
        f"and training alone on the others; {1e3 * ITL_S:.0f} ms between tokens; a backward pass costs two forward "
        "passes, both ways.",
        fair=f"{SPAN_S:.0f} s of traffic; one device stands for its like. 12 instead of 20 requests a second, as two "
        "of our devices must be able to serve them alone. (The first run of this claim had 60 training sequences a "
        "device, and ran out of them.)",
        numbers=(
            Number("training, together over apart, light", 2.5, Band(2.5, 6.8), MORE, "{:.2f}x"),
            Number("training, together over apart, heavy", 1.9, Band(1.9, 4.8), MORE, "{:.2f}x"),
            Number("p99 between tokens, together", None, Band(high=1.1e3 * ITL_S), Band(high=2e3 * ITL_S), "{:.0f} ms"),
            Number("p99 between tokens, apart, heavy", form="{:.0f} ms"),
            Number("training together, light", form="{:,.0f} tokens/s"),
            Number("training together, heavy", form="{:,.0f} tokens/s"),
            Number("training apart", form="{:,.0f} tokens/s"),
        ),
        obtain=_obtain,
        because=(
            "Against half of the cluster no policy can gain more than twice: four devices instead of two. More is "
            "only possible against a smaller part, or against a slower trainer, as the paper's baselines are.",
            "A device that trains alone takes the largest steps there are; next to decodes a step has to end within "
            "the SLO, and reads all weights for fewer tokens.",
            "Backward passes are counted, not run: their steps cannot be cut where a forward pass can.",
        ),
    ),
)
