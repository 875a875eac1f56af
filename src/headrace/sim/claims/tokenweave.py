"""TokenWeave (Gond et al., 2025): half of a batch computes while the other half's sums travel.

t = max(compute of A, all-reduce of B) + max(compute of B, all-reduce of A)   against   compute + all-reduce
"""

from __future__ import annotations

from headrace.sim.claims.claim import MORE, Band, Claim, Number
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import batch_of
from headrace.sim.scenario import convention, placement
from headrace.sim.settings import SimulateSettings

PAPER = "Gond et al., TokenWeave: Efficient Compute-Communication Overlap for Distributed LLM Inference, MLSys 2026"
_NODE = SimulateSettings(model="llama-3.3-70b", hardware="8xH100-SXM", host_ms=0.0)
WAVE = 0.02  # of the compute: what a cut between two waves of tiles costs
TOKENS = (256, 1024, 2048, 4096, 8192)


def _terms(cost: Analytic, tokens: int) -> tuple[float, float]:
    """(seconds without the network, seconds of the network) of a prompt of so many tokens."""
    price = cost.estimate(batch_of([(0, tokens)], 1))
    return price.seconds - price.network_s, price.network_s


def _gain(cost: Analytic, tokens: int) -> float:
    compute_s, network_s = _terms(cost, tokens)
    half_s, half_network_s = _terms(cost, tokens // 2)
    woven_s = 2 * max(half_s, half_network_s) + WAVE * compute_s
    return (compute_s + network_s) / woven_s


def _obtain() -> tuple[float, ...]:
    cost = Analytic(placement(_NODE), convention(_NODE))
    gains = [_gain(cost, tokens) for tokens in TOKENS]
    compute_s, network_s = _terms(cost, 4096)
    return max(gains), gains[0], network_s / (compute_s + network_s), *gains[1:]


CLAIMS = (
    Claim(
        name="tokenweave-prefill",
        system="TokenWeave",
        paper=PAPER,
        says="Overlapping the all-reduces of one half of a batch with the other half's compute takes up to 1.29 "
        "times less time from about 1,024 tokens on, and has to be switched off for small batches.",
        source="abstract; the formula of two halves, with a penalty of 2 % for the cut, from the research notes",
        setting="llama-3.3-70b on 8xH100-SXM (tensor 8), prefill of one prompt; prices of halves by the roofline.",
        fair="No simulation: the price of one step.",
        numbers=(
            Number("largest gain from 1,024 tokens on", 1.29, Band(1.15, 1.35), MORE, "{:.2f}x"),
            Number("gain at 256 tokens", 1.0, Band(high=1.0), Band(high=1.05), "{:.2f}x"),
            Number("share of the network at 4,096 tokens", 0.20, form="{:.1%}"),
            *(Number(f"gain at {tokens:,} tokens", form="{:.2f}x") for tokens in TOKENS[1:]),
        ),
        obtain=_obtain,
        because=(
            "The gain is bounded by the share of the network, which our ring at 80 % of NVLink puts elsewhere than "
            "their multimem all-reduce, which is also fused with the norm.",
            "Halves of small batches read all weights twice; where exactly that turns the gain round depends on the "
            "shares of the peaks.",
        ),
    ),
)
