"""Nexus (2025): two lanes on one device, split anew at every step by what the steps at hand would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from statistics import mean

from headrace.core.config import EngineSettings
from headrace.sim.claims.claim import LESS, MORE, Band, Claim, Number
from headrace.sim.claims.setting import ask, device, exactly, log_normal, poisson, requests
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals
from headrace.workload.arrival import Arrival
from headrace.workload.corpora import CORPORA
from headrace.workload.laws import corpus

PAPER = "Nexus: proactive intra-GPU disaggregation of prefill and decode, arXiv:2507.06608"
_L20 = device(  # an L40 with the arithmetic of an L20: 119.5 of 181 TFLOP/s, the same memory
    SimulateSettings(model="llama-3.1-8b", hardware="L40", compute_share=0.41, bandwidth_share=0.8, host_ms=3.0)
)
_BASE = EngineSettings(max_running=256, prefix_cache=False, token_budget=2048)
_LONG = log_normal((5000, 9000), (250, 500), 16_384)
RATE = 1.1  # of which the chunked baseline can just serve all
COUNT = 400  # of which all lives are kept


def _mixed(rng: Random) -> tuple[int, int]:
    """60 % ShareGPT, 40 % long data collections."""
    return corpus(CORPORA["sharegpt"])(rng) if rng.random() < 0.6 else _LONG(rng)


def _asked(settings: EngineSettings, arrivals: Sequence[Arrival]) -> Totals:
    return ask(_L20(settings), arrivals)


def _tail_s(totals: Totals) -> float:
    """p95 of the TTFT of the tenth with the longest prompts."""
    lives = sorted(totals.lives.kept, key=lambda life: life[4])[-len(totals.lives.kept) // 10 :]
    late = sorted((life[2] or life[3]) - life[0] for life in lives)
    return late[int(0.95 * (len(late) - 1))]


def _obtain() -> tuple[float, ...]:
    arrivals = poisson(requests(_mixed, COUNT, exactly), RATE)
    chunked = _asked(_BASE, arrivals)
    shortest = _asked(replace(_BASE, ordering="shortest-prompt"), arrivals)
    nexus = _asked(replace(_BASE, lanes="nexus", ordering="shortest-prompt"), arrivals)
    ttft = [mean((life[2] or life[3]) - life[0] for life in one.lives.kept) for one in (chunked, shortest, nexus)]
    gain = (ttft[0] - ttft[1]) / max(ttft[0] - ttft[2], 1e-9)
    tbt = [one.itl_s.quantile(0.95) or 0.0 for one in (chunked, nexus)]
    tail = _tail_s(nexus) / _tail_s(chunked)
    return ttft[2] / ttft[0], gain, tbt[0] / tbt[1], tail, *ttft, *(1e3 * one for one in tbt)


CLAIMS = (
    Claim(
        name="nexus-mixed",
        system="Nexus",
        paper=PAPER,
        says="Up to 20 times shorter TTFT and 2.5 times shorter time between tokens than vLLM; most of the first comes "
        "from serving the shortest prompt first, and the longest prompts pay for it.",
        source="abstract for the factors; a reading note for the loss of long prompts; the bounds of the ablation are "
        "our own, from the research notes",
        setting="llama-3.1-8b on an L20 (an L40 with its arithmetic scaled), 60 % ShareGPT's lengths and 40 % long "
        f"prompts (log-normal, median 5,000 and p90 9,000), {RATE} requests a second; chunks of 2,048 first come "
        "first served, the same shortest prompt first, and two lanes by prediction.",
        fair=f"{COUNT} requests at one rate instead of a sweep; the long half is drawn from remembered quantiles.",
        numbers=(
            Number("mean TTFT over chunked, first come first served", None, Band(high=0.5), LESS, "{:.2f}x"),
            Number("of that gain, by shortest prompt first alone", None, Band(0.6), Band(0.0), "{:.2f}"),
            Number("p95 time between tokens, chunked over lanes", 2.5, Band(1.67), MORE, "{:.2f}x"),
            Number("p95 TTFT of the longest tenth over chunked", None, Band(1.0), Band(1.0), "{:.2f}x"),
            Number("mean TTFT, chunked", form="{:.2f} s"),
            Number("mean TTFT, shortest prompt first", form="{:.2f} s"),
            Number("mean TTFT, Nexus", form="{:.2f} s"),
            Number("p95 time between tokens, chunked", form="{:.0f} ms"),
            Number("p95 time between tokens, Nexus", form="{:.0f} ms"),
        ),
        obtain=_obtain,
        because=(
            "Its equations were not published where we could read: the values of alpha, beta, delta and of the switch "
            "by KV use, the form of its saturation and of its contention are chosen here.",
            "At the load that the chunked baseline can just serve, arithmetic decides TTFT, and lanes leave some of it "
            "to decodes: shortest prompt first alone gains more here than with lanes, which buy time between tokens.",
            "How fast a waiting prompt ages decides how long the longest wait; the rate is chosen here.",
            "Both sides run one engine here, so the factors of the abstract, against vLLM, hold engine differences "
            "that are missing.",
        ),
    ),
)
