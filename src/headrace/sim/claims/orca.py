"""Orca (Yu et al., OSDI 2022): the batch is formed anew in every step, against batches that run to their end."""

from __future__ import annotations

from headrace.core.config import EngineSettings
from headrace.sim.claims.claim import MORE, Band, Claim, Number, times
from headrace.sim.claims.setting import (
    Device,
    ask,
    device,
    exactly,
    highest,
    median_per_token_s,
    poisson,
    requests,
    uniform,
)
from headrace.sim.settings import SimulateSettings

PAPER = "Yu et al., Orca, OSDI 2022"
_SMALL = device(SimulateSettings(model="mistral-7b", hardware="A100-80GB"))
_GPT = device(SimulateSettings(model="gpt-3-175b", hardware="2x8xA100-40GB@ib-hdr", pipeline=2))


def _settings(batch: str, most: int, admission: str) -> EngineSettings:
    budget = 16_384  # tokens: no prompts of one batch exceed it
    return EngineSettings(batch=batch, admission=admission, max_running=most, token_budget=budget, prefix_cache=False)


def _offline() -> tuple[float, ...]:
    backlog = requests(uniform((64, 64), (8, 256)), 1024, exactly)
    spans = [ask(_SMALL(_settings(batch, 16, "reserve-all")), backlog).span_s for batch in ("static", "orca")]
    return (spans[0] / spans[1],)


def _rate(under: Device, batch: str) -> float:
    asked = requests(uniform((32, 512), (1, 128)), 400, exactly)
    site = under(_settings(batch, 32, "reserve-all"))
    return highest(lambda rate: median_per_token_s(ask(site, poisson(asked, rate))) <= 0.19, 0.05, 40.0)


def _latency() -> tuple[float, ...]:
    static, orca = (_rate(_GPT, batch) for batch in ("static", "orca"))
    return orca / static, orca, static


CLAIMS = (
    Claim(
        name="orca-offline",
        system="Orca",
        paper=PAPER,
        says="A batch that waits for its longest answer wastes E[longest of a batch] / E[length]: 241 / 132 = 1.8 "
        "times the throughput, for answers of 8 to 256 tokens in batches of 16.",
        source="the ratio follows from the lengths; the paper's own offline comparison is with another engine",
        setting="mistral-7b on an A100-80GB, 1,024 prompts of 64 tokens that all wait, answers of 8 to 256 tokens, "
        "16 at once: batch `orca` against `static`.",
        fair="A model that fits one device: decode steps of 16 requests take as long with one answer as with another.",
        numbers=(Number("throughput, step by step over whole batches", 1.8, Band(1.5, 2.1), MORE, "{:.2f}x"),),
        obtain=_offline,
        because=(
            "Places of those who are done cost our static batch nothing, while a real one goes on computing them.",
            "With few batches the last answers of the whole job blur the ratio: with 64 requests it is nearer to 1.5.",
        ),
    ),
    Claim(
        name="orca-latency",
        system="Orca",
        paper=PAPER,
        says="GPT-3 175B serves 36.9 times the load of FasterTransformer at the same latency of 190 ms a token.",
        source="the paper's abstract and section 6; batch limits and lengths as remembered",
        setting="gpt-3-175b on 2 nodes of 8 A100-40GB (tensor 8, pipeline 2), Poisson arrivals, prompts of 32 to 512 "
        "and answers of 1 to 128 tokens, 32 at once; highest rate whose median of (end - arrival) / tokens is 190 ms.",
        fair="400 requests a rate, 9 rates each: the median of 400 is good to a few percent, the claim is a factor.",
        numbers=(
            Number("highest rate, step by step over whole batches", 36.9, times(36.9), MORE, "{:.1f}x"),
            Number("of Orca", 6.8, form="{:.2f} requests/s"),
            Number("of static batches", 0.185, form="{:.2f} requests/s"),
        ),
        obtain=_latency,
        because=(
            "Both run on the same modelled kernels here; FasterTransformer's engine, its padding of prompts to the "
            "longest and its fixed batch are part of the 36.9.",
            "Our static batches start with whoever waits, and answers leave when they are complete, not with the "
            "batch.",
            "No micro-batches are in flight between the two stages, for either.",
        ),
    ),
)
