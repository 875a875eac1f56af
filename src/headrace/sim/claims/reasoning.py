"""Serving of reasoning models unveiled (Li et al., 2025): long answers of very unequal length."""

from __future__ import annotations

from headrace.core.config import EngineSettings
from headrace.sim.claims.claim import MORE, Band, Claim, Number
from headrace.sim.claims.setting import Lengths, Steps, ask, device, exactly, mean_and_deviation, poisson, requests
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals
from headrace.workload.laws import parse_pairs

PAPER = "Li et al., Reasoning Language Model Inference Serving Unveiled: An Empirical Study, 2025"
RATE = 3.0  # requests of chat per second
COUNTS = {"sharegpt": 2400, "reasoning:5000:1.0:32768": 400}
_LLAMA = device(SimulateSettings(model="llama-3.1-8b", hardware="H100-SXM"))
_SETTINGS = EngineSettings(token_budget=2048, prefix_cache=False, max_running=1024)
CLOSED = 64  # requests of a batch that starts at once


def _at_rate(name: str, rate: float) -> tuple[Totals, float]:
    """What came of it, and the deviation of the KV in use, in tokens, without the first and last tenth."""
    asked = poisson(requests(parse_pairs(name), COUNTS[name], exactly), rate)
    steps = Steps()
    totals = ask(_LLAMA(_SETTINGS), asked, steps)
    tenth = len(steps.blocks) // 10
    _, deviation = mean_and_deviation(steps.blocks[tenth:-tenth])
    return totals, deviation * _SETTINGS.block_tokens


def _mean_output(lengths: Lengths, count: int) -> float:
    return sum(one.output_tokens for one in requests(lengths, count, exactly)) / count


def _straggling(totals: Totals) -> float:
    """p99 over p50 of the time from arrival to end."""
    return (totals.e2e_s.quantile(0.99) or 0.0) / (totals.e2e_s.quantile(0.5) or 1.0)


def _tail() -> float:
    """Largest share of a closed batch that still runs in the last tenth of its time."""
    batch = requests(parse_pairs("reasoning:5000:1.0:32768"), CLOSED, exactly)
    totals = ask(_LLAMA(_SETTINGS), batch)
    ends = [life[3] for life in totals.lives.kept]
    return sum(end > 0.9 * max(ends) for end in ends) / CLOSED


def _obtain() -> tuple[float, ...]:
    (chat, thinking), rate = COUNTS, RATE
    slower = rate * _mean_output(parse_pairs(chat), 4000) / _mean_output(parse_pairs(thinking), 4000)
    (short, short_kv), (long, long_kv) = _at_rate(chat, rate), _at_rate(thinking, slower)
    return long_kv / short_kv, _straggling(long) / _straggling(short), _tail(), short_kv, long_kv


CLAIMS = (
    Claim(
        name="reasoning-load",
        system="Reasoning serving study",
        paper=PAPER,
        says="Reasoning models use much KV memory that fluctuates heavily, and a few requests straggle far behind.",
        source="the study's findings; the bounds are our own",
        setting=f"llama-3.1-8b on an H100-SXM, ShareGPT at {RATE:g} requests a second against reasoning (answers "
        f"log-normal around 5,000 tokens, sigma 1, at most 32,768) at the same rate of output tokens; and {CLOSED} "
        "at once.",
        fair="2,400 and 400 requests: each about a quarter of an hour.",
        numbers=(
            Number("deviation of the KV in use, reasoning over chat", None, Band(2.0), MORE, "{:.2f}x"),
            Number("p99 / p50 of the time to the end, reasoning over chat", None, Band(1.5), MORE, "{:.2f}x"),
            Number("of a closed batch, running in its last tenth", None, Band(high=0.1), Band(high=0.3), "{:.1%}"),
            Number("deviation of the KV in use, chat", form="{:,.0f} tokens"),
            Number("deviation of the KV in use, reasoning", form="{:,.0f} tokens"),
        ),
        obtain=_obtain,
        because=(
            "ShareGPT has stragglers of its own: its answers spread from 5 to 1,000 tokens, about as far as "
            "reasoning's relative to their median.",
            "The study measured small models on one device, with bursts; here both come as Poisson processes, so "
            "that only lengths differ.",
        ),
    ),
)
