"""FastSwitch (Shen et al., 2024): swapping KV in groups of blocks, and only what changed since the last turn."""

from __future__ import annotations

from headrace.core.shape import KV_BF16, ModelShape
from headrace.sim.claims.claim import MORE, Band, Claim, Number
from headrace.sim.hardware import link
from headrace.sim.models import model

PAPER = (
    "Shen et al., FastSwitch: Optimizing Context Switching Efficiency in Fairness-aware LLM Serving, arXiv:2411.18424"
)
BLOCK_TOKENS = 16
GROUP_BLOCKS = 60  # of the first group a request gets
LAUNCH_S = 10e-6  # of one copy
TURNS = 5.5  # of a conversation in multi-round ShareGPT


def _efficiency(shape: ModelShape, blocks: int) -> float:
    """Share of the link that is used when each copy moves `blocks` adjacent blocks of one layer's keys or values."""
    nbytes = blocks * BLOCK_TOKENS * KV_BF16.bytes_per_token(shape) / shape.layers / 2
    moving_s = nbytes / link("pcie4").bytes_per_s
    return moving_s / (moving_s + LAUNCH_S)


def _obtain() -> tuple[float, ...]:
    shape = model("llama-3-8b")
    single, grouped = _efficiency(shape, 1), _efficiency(shape, GROUP_BLOCKS)
    all_of_it, changed = TURNS * (TURNS + 1) / 2, TURNS
    return single, grouped, grouped / single, changed / all_of_it - 1


CLAIMS = (
    Claim(
        name="fastswitch-copies",
        system="FastSwitch",
        paper=PAPER,
        says="Copied block by block, swapping uses 0.3 to 0.5 of the PCIe bandwidth; in groups more than 0.9. "
        "Keeping the host's copies from turn to turn leaves about half of the bytes.",
        source="the bounds and the 53 % from the research notes, in part as remembered; the paper's headline is a "
        "1.4 to 5.8 times shorter tail of TTFT",
        setting=f"llama-3-8b in bf16, blocks of {BLOCK_TOKENS} tokens, one copy for each layer's keys and values, "
        f"{LAUNCH_S * 1e6:.0f} us to launch a copy, PCIe 4; groups of {GROUP_BLOCKS} blocks; conversations of "
        f"{TURNS} turns of equal length.",
        fair="A closed form: t = copies x launch + bytes / bandwidth. What it does to the tail needs a swap tier.",
        numbers=(
            Number("share of the bandwidth, block by block", 0.4, Band(0.3, 0.5), Band(high=0.9), "{:.2f}"),
            Number("share of the bandwidth, in groups", 0.9, Band(0.9), Band(0.5), "{:.2f}"),
            Number("bandwidth, groups over blocks", 2.2, Band(1.8), MORE, "{:.1f}x"),
            Number("bytes swapped out, only what changed", -0.53, Band(-0.7, -0.4), Band(high=0.0), "{:+.0%}"),
        ),
        obtain=_obtain,
        because=(
            "The share block by block is the size of a copy: keys and values of 8 heads are small, those of models "
            "without grouped heads four times as large.",
            "Launches of several copies may overlap, which the formula does not know.",
            "How much changes between turns is what the turns are: growing contexts save more than short ones.",
        ),
    ),
)
