"""Layered prefill (Lee et al., From Tokens to Layers, 2025): a prompt passes one group of layers a step, not one chunk.

    chunked   step 1: all layers, chunk 1      layered   step 1: group 1 of the layers, all of the prompt
              step 2: all layers, chunk 2                step 2: group 2 of the layers, all of the prompt

Both keep decodes running; but each chunk wakes nearly all experts of all layers again, and a group is woken once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.core.config import EngineSettings
from headrace.core.shape import ModelShape
from headrace.sim.claims.claim import Band, Claim, Number
from headrace.sim.claims.sarathi import ARXIV
from headrace.sim.claims.setting import ask, device, exactly, poisson, requests
from headrace.sim.cost.operators import expected_experts
from headrace.sim.models import model
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals

PAPER = "Lee et al., From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving, arXiv:2510.08055"
PROMPT, CHUNK, GROUPS = 8192, 512, 16
BATCHES = (4, 16, 32, 64)  # requests that decode beside the prompt
DRAWS = 64  # of the experts of a step


def _traffic(shape: ModelShape, decodes: int, woken: dict[int, float]) -> tuple[float, float]:
    """Bytes of expert weights read while one prompt is computed, (chunked, layered). `woken` are the experts that so
    many tokens wake in one layer."""
    layers, expert = shape.layers - shape.dense_layers, 2.0 * shape.expert_weights
    chunked = PROMPT // CHUNK * layers * woken[CHUNK + decodes] * expert
    layered = layers * (woken[PROMPT + decodes] + (GROUPS - 1) * woken[decodes]) * expert
    return chunked, layered


def _token_counts() -> list[int]:
    return sorted({count for decodes in BATCHES for count in (decodes, CHUNK + decodes, PROMPT + decodes)})


def _expected(shape: ModelShape) -> dict[int, float]:
    return {count: expected_experts(count, shape.experts, shape.experts_per_token) for count in _token_counts()}


def _drawn(shape: ModelShape, skew: float, counts: Sequence[int]) -> dict[int, float]:
    """Experts woken by drawn choices of so many tokens, a mean of DRAWS steps. Expert number r is as popular as
    (r + 1)^-skew; a token's choices are without replacement (the k largest of log popularity + Gumbel noise)."""
    rng = np.random.default_rng(0)
    popularity = -skew * np.log(np.arange(1, shape.experts + 1))
    woken = {}
    for count in counts:
        steps = max(2, min(DRAWS, DRAWS * CHUNK // count))  # the woken of many tokens vary little
        total = 0
        for _ in range(steps):
            noisy = popularity + rng.gumbel(size=(count, shape.experts))
            chosen = np.argpartition(noisy, -shape.experts_per_token, axis=1)[:, -shape.experts_per_token :]
            total += len(np.unique(chosen))
        woken[count] = total / steps
    return woken


def _saved(woken: dict[int, float]) -> tuple[float, ...]:
    shape = model("qwen3-30b-a3b")
    pairs = [_traffic(shape, decodes, woken) for decodes in BATCHES]
    return (*(layered / chunked - 1 for chunked, layered in pairs), pairs[0][0] / 1e9, pairs[1][1] / 1e9)


def _closed_form() -> tuple[float, ...]:
    return _saved(_expected(model("qwen3-30b-a3b")))


def _monte_carlo() -> tuple[float, ...]:
    shape = model("qwen3-30b-a3b")
    even, skewed = (_saved(_drawn(shape, skew, _token_counts())) for skew in (0.0, 0.8))
    return (*even[:4], *skewed[:4])


def _served(batch: str) -> Totals:
    """The repository's benchmark: 100 prompts as summaries of papers have them, at 1.5 a second."""
    node = device(SimulateSettings(model="qwen3-30b-a3b", hardware="2xH100-SXM"))
    settings = EngineSettings(batch=batch, token_budget=CHUNK, prefix_cache=False)
    return ask(node(settings), poisson(requests(ARXIV, 100, exactly), 1.5))


def _latency() -> tuple[float, ...]:
    chunked, layered = _served("chunked"), _served("layered")
    pairs = (
        (layered.ttft_s, chunked.ttft_s),
        (layered.tpot_s, chunked.tpot_s),
        (layered.e2e_s, chunked.e2e_s),
    )
    changes = [one.sum / other.sum - 1 for one, other in pairs]  # of means: the requests are the same
    means = [1e3 * (sketch.mean or 0.0) for sketch in (chunked.ttft_s, chunked.tpot_s)]
    tails = [1e3 * (totals.itl_s.quantile(0.99) or 0.0) for totals in (chunked, layered)]
    return (*changes, *means, *tails)


def _change(what: str, claimed: float) -> Number:
    """Half of it to one and a half times as much."""
    return Number(what, claimed, Band(1.5 * claimed, 0.5 * claimed), Band(high=0.0), "{:+.1%}")


def _numbers(prefix: str, judged: bool = True) -> tuple[Number, ...]:
    claimed = {4: -0.72, 16: -0.33, 32: -0.12, 64: -0.02}
    return tuple(
        Number(
            f"{prefix}{decodes} decodes",
            change if judged else None,
            Band(change - 0.03, change + 0.03) if judged else None,
            Band(high=0.0),
            "{:+.1%}",
        )
        for decodes, change in claimed.items()
    )


_SETTING = (
    f"qwen3-30b-a3b in bf16 (128 experts, 8 a token, 48 layers), one prompt of {PROMPT:,} tokens: chunks of {CHUNK} "
    f"against {GROUPS} groups of layers; bytes of expert weights read meanwhile, decodes included"
)
_SAYS = (
    "Layered prefill reads 12 to 39 % fewer bytes of experts than chunks of 512; the gain is the larger the fewer "
    "requests decode, and vanishes where decodes alone wake all experts."
)
_SOURCE = (
    "12 to 39 % by a reading note, where the abstract's first version has up to 39 % more bytes in chunks; by batch "
    "size from the closed form of the same activation model"
)

CLAIMS = (
    Claim(
        name="layered-prefill-traffic",
        system="Layered prefill",
        paper=PAPER,
        says=_SAYS,
        source=_SOURCE,
        setting=f"{_SETTING}; expected number of experts, every choice equally likely.",
        fair="A closed form of the whole setting.",
        numbers=(
            *_numbers(""),
            Number("chunked, 4 decodes", 928.0, Band(900, 950), form="{:.0f} GB"),
            Number("layered, 16 decodes", 618.0, Band(600, 640), form="{:.0f} GB"),
        ),
        obtain=_closed_form,
        because=(
            "The size of the gain is the batch: the paper's 12 to 39 % are what batches of about 14 to 32 give.",
            "Time does not follow bytes where a step is bound by arithmetic; a dense model gains nothing.",
            "928 GB are the chunked bytes to within what 4 to 64 decodes beside 512 tokens change, under 1 %.",
        ),
    ),
    Claim(
        name="layered-prefill-latency",
        system="Layered prefill",
        paper=PAPER,
        says="Against chunks of 512, mean TTFT falls by 30 %, mean time per output token by 23 %, the whole by 28 %.",
        source="the repository's benchmark against vLLM 0.10.2: 1018.8 to 712.8, 19.7 to 15.1 and 4904 to 3525 ms",
        setting=f"qwen3-30b-a3b on 2xH100-SXM (tensor 2), 100 prompts as summaries of papers at 1.5 a second; batch "
        f"`layered` against `chunked`, both with {CHUNK} tokens a step.",
        fair="As many prompts as theirs; lengths log-normal through the published quantiles.",
        numbers=(
            _change("mean TTFT", -0.30),
            _change("mean time per output token", -0.23),
            _change("mean time to the end", -0.28),
            Number("mean TTFT in chunks", 1018.8, form="{:.0f} ms"),
            Number("mean time per output token in chunks", 19.7, form="{:.1f} ms"),
            Number("p99 between tokens, chunks", 36.8, form="{:.1f} ms"),
            Number("p99 between tokens, layers", 27.9, form="{:.1f} ms"),
        ),
        obtain=_latency,
        because=(
            "A modelled step is faster than vLLM's on the same devices, so fewer requests decode side by side and less "
            "time is spent in a prompt at all: the rate of 1.5 means a lighter load here.",
            "The paper compares its own engine with vLLM; here both are the same engine.",
            "Few decodes wake few experts, so a lighter load is what layers gain most at (see the traffic by batch).",
        ),
    ),
    Claim(
        name="layered-prefill-skew",
        system="Layered prefill",
        paper=PAPER,
        says=_SAYS,
        source=_SOURCE,
        setting=f"{_SETTING}; experts drawn, equally likely and with popularity rank^-0.8.",
        fair=f"Up to {DRAWS} drawn steps of one layer stand for all layers and steps, which are alike.",
        numbers=(*_numbers("even, "), *_numbers("skewed, ", judged=False)),
        obtain=_monte_carlo,
        because=(
            "How skewed real routing is, and that neighbouring tokens choose alike, is not published; both wake "
            "fewer experts, the chunks' as well as the decodes'.",
        ),
    ),
)
