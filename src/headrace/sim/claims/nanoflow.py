"""NanoFlow (Zhu et al., OSDI 2025): nano-batches overlap arithmetic, memory and network within one device.

serial   |compute|memory|network|compute|memory|network|       ideal   |compute|compute|compute|
                                                                       |memory |memory |
                                                                       |network|network|
"""

from __future__ import annotations

from headrace.sim.claims.claim import LESS, MORE, Band, Claim, Number
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, batch_of
from headrace.sim.cost.conventions import Overlap
from headrace.sim.scenario import convention, placement
from headrace.sim.settings import SimulateSettings

PAPER = "Zhu et al., NanoFlow: Towards Optimal Large Language Model Serving Throughput, OSDI 2025"
DENSE = 2048  # tokens of a step
CUTLASS = 260 / 312  # of an A100's peak, which its best product reaches
_NODE = SimulateSettings(model="llama-2-70b", hardware="8xA100-80GB", compute_share=0.8)
_ALONE = SimulateSettings(model="llama-3-8b", hardware="A100-80GB", compute_share=0.8)
LENGTHS = {"Splitwise": (1155, 211), "LMSYS": (102, 222), "ShareGPT": (246, 322)}


def _cost(settings: SimulateSettings, overlap: Overlap) -> Analytic:
    return Analytic(placement(settings), convention(settings), overlap=overlap)


def steady(prompt: int, output: int, kv_tokens: int, dense: int = DENSE) -> Batch:
    """A step of a replica that is never idle: as many tokens of prompts and of answers as requests have, prompts whole
    where they fit, and every decode half way through its answer; smaller where memory holds fewer decodes."""
    dense = min(dense, kv_tokens // (prompt + output // 2) * (prompt + output) // output)
    decodes = round(dense * output / (prompt + output))
    rows = [(prompt + output // 2, 1)] * decodes
    left = dense - decodes
    while left > 0:
        rows.append((0, min(prompt, left)))
        left -= prompt
    return batch_of(rows, decodes)


def _gain(settings: SimulateSettings, prompt: int, output: int) -> float:
    batch = steady(prompt, output, placement(settings).kv_tokens())
    return _cost(settings, "serial").estimate(batch).seconds / _cost(settings, "ideal").estimate(batch).seconds


def _bound() -> tuple[float, ...]:
    """Tokens per second and device if only arithmetic took time."""
    settings = SimulateSettings(model="llama-2-70b", hardware="8xA100-80GB", compute_share=CUTLASS)
    batch = steady(512, 512, placement(settings).kv_tokens())
    cost = _cost(settings, "ideal").estimate(batch)
    return batch.tokens / cost.seconds / 8, float(cost.bound == "compute")


def _overlap() -> tuple[float, ...]:
    gains = [_gain(_NODE, *lengths) for lengths in LENGTHS.values()]
    prefill, decode, alone = _gain(_NODE, 512, 1), _gain(_NODE, 512, 1024), _gain(_ALONE, 512, 512)
    return prefill, decode, alone, *gains


def _splitting() -> tuple[float, ...]:
    """Of a step's speed, what two halves of it have left when nothing overlaps."""
    cost, kv_tokens = _cost(_NODE, "serial"), placement(_NODE).kv_tokens()
    whole, half = steady(512, 512, kv_tokens), steady(512, 512, kv_tokens, DENSE // 2)
    return (cost.estimate(whole).seconds / (2 * cost.estimate(half).seconds),)


def _headline() -> tuple[float, ...]:
    gains = [_gain(_NODE, *lengths) for lengths in LENGTHS.values()]
    return sum(gains) / len(gains), max(gains)


_WHERE = f"llama-2-70b on 8xA100-80GB, steps of {DENSE:,} tokens in a steady state"
_NO_SIMULATION = "No simulation: the price of one step, by the conventions `serial` and `ideal`."
_ROOFLINE = "A roofline overlaps without interference; kernels that share a device slow each other down."

CLAIMS = (
    Claim(
        name="nanoflow-bound",
        system="NanoFlow",
        paper=PAPER,
        says="Serving Llama-2-70B on eight A100s is bound by arithmetic: 1,857 tokens a second and device are optimal.",
        source="section 3.5: peak of CUTLASS over twice the parameters",
        setting=f"{_WHERE}, prompts and answers of 512 tokens, {CUTLASS:.1%} of the peak FLOP/s (CUTLASS), "
        "everything overlapped.",
        fair=_NO_SIMULATION,
        numbers=(
            Number("tokens per second and device", 1857, Band(1671, 2043), Band(1000, 2500), "{:,.0f}"),
            Number("bound by arithmetic", 1, Band(1, 1), Band(1, 1), "{:.0f}"),
        ),
        obtain=_bound,
        because=(
            "Ours also pays for the arithmetic of attention and of the head, which peak / (2 parameters) leaves out, "
            "and reads 69.0 instead of 70 billion parameters.",
        ),
    ),
    Claim(
        name="nanoflow-overlap",
        system="NanoFlow",
        paper=PAPER,
        says="Overlapping gains 1.07x where only the network hides (prefill only) and 1.17x where memory does too "
        "(decode-heavy), over the same engine without overlap.",
        source="the paper's ablation, by a reading note; an ideal overlap of this step gains 1.36 to 1.47x by hand",
        setting=f"{_WHERE}, 80 % of the peak FLOP/s; prefill of 512-token prompts, prompts of 512 with answers of "
        "1,024, and a llama-3-8b alone on one A100.",
        fair=_NO_SIMULATION,
        numbers=(
            Number("gain of an ideal overlap, prefill only", 1.07, Band(1.05, 1.47), MORE, "{:.2f}x"),
            Number("gain of an ideal overlap, decode-heavy", 1.17, Band(1.05, 1.47), MORE, "{:.2f}x"),
            Number("gain on one device, without a network", None, Band(1.0, 1.25), Band(1.0), "{:.2f}x"),
            *(Number(f"gain for lengths of {name}", form="{:.2f}x") for name in LENGTHS),
        ),
        obtain=_overlap,
        because=(
            _ROOFLINE,
            "What is obtained is a bound: the paper's ablation reaches a part of it.",
            "Memory and links are as fast as the convention has them: slower ones have more to hide. Where attention "
            "reads as long as products compute, one device gains as well.",
        ),
    ),
    Claim(
        name="nanoflow-headline",
        system="NanoFlow",
        paper=PAPER,
        says="1.91 times the throughput of TensorRT-LLM, as a mean over Splitwise, LMSYS and ShareGPT.",
        source="section 6.2",
        setting=f"{_WHERE}, 80 % of the peak FLOP/s; an ideal overlap over none, with the mean lengths of each corpus.",
        fair=_NO_SIMULATION,
        numbers=(
            Number("mean gain of an ideal overlap", 1.91, Band(1.66, 2.20), MORE, "{:.2f}x"),
            Number("largest gain", form="{:.2f}x"),
        ),
        obtain=_headline,
        because=(
            "Overlap cannot gain that much on this hardware: what is left of the 1.91 is the difference of two "
            "engines (scheduling that hides behind the device, batches of constant size, kernels), as the paper's "
            "own ablation says.",
            _ROOFLINE,
        ),
    ),
    Claim(
        name="nanoflow-splitting",
        system="NanoFlow",
        paper=PAPER,
        says="Splitting into nano-batches without overlapping them costs 13.2 % of the throughput.",
        source="the paper's ablation, by a reading note",
        setting=f"{_WHERE}, prompts and answers of 512 tokens; one step against two of half its tokens.",
        fair=_NO_SIMULATION,
        numbers=(Number("throughput in two nano-batches", 0.868, Band(0.82, 0.92), LESS, "{:.3f}x"),),
        obtain=_splitting,
        because=(
            "At 1,024 tokens every product is still bound by arithmetic, so a roofline sees weights that are read "
            "twice at no cost; real kernels of half the rows reach less of the peak.",
            "The halves here read and exchange half as much each, and wait twice for the latency of the links.",
        ),
    ),
)
