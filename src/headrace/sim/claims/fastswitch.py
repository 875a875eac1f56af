"""FastSwitch (Shen et al., 2024): swapping KV in groups of blocks, beside the work, and only what changed since the
last turn. The copies by themselves as a closed form, and what they do to the tail of conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from random import Random

from headrace.core.config import Bytes, EngineSettings
from headrace.core.shape import KV_BF16, ModelShape
from headrace.sim.claims.claim import MORE, Band, Claim, Number, times
from headrace.sim.claims.setting import ask, patient
from headrace.sim.hardware import link
from headrace.sim.models import model
from headrace.sim.run import Site
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals
from headrace.workload.arrival import Arrival
from headrace.workload.laws import fixed, parse_count, parse_pairs
from headrace.workload.sessions import Recipe, conversations
from headrace.workload.times import renewal

PAPER = (
    "Shen et al., FastSwitch: Optimizing Context Switching Efficiency in Fairness-aware LLM Serving, arXiv:2411.18424"
)
BLOCK_TOKENS = 16
GROUP_BLOCKS = 60  # of the first group a request gets
LAUNCH_S = 10e-6  # of one copy
TURNS = 5.5  # of a conversation in multi-round ShareGPT
CONVERSATIONS = 1000
HOST_BYTES = Bytes(60_000_000_000)
UPDATES = 0.04  # of the priorities, a step
_CONTEXT = 8192


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


def _traffic() -> Iterator[Arrival]:
    """As many conversations as come to one request a second; who has its answer asks on at once."""
    recipe = Recipe(parse_pairs("sharegpt"), parse_count("1:10"), fixed(0.0), max_context_tokens=_CONTEXT)
    return conversations(islice(renewal(1 / TURNS)(Random(1)), CONVERSATIONS), recipe, "1")


def _site(host_bytes: int, reuse: bool = False, as_vllm: bool = False) -> Site:
    """The same scheduler, with priorities that change; `as_vllm` copies block by block before the work."""
    settings = EngineSettings(
        ordering="markov",
        priority_updates=UPDATES,
        preemption="swap",
        batch="prefill-first",
        token_budget=_CONTEXT,
        prefix_cache=reuse,
        host_kv_memory=Bytes(host_bytes),
    )
    site = Scenario(SimulateSettings(model="llama-3-8b", hardware="A10G"), patient(settings)).site()
    return replace(site, host=site.host and replace(site.host, in_groups=not as_vllm, beside_work=not as_vllm))


def _tail() -> tuple[float, ...]:
    whole, mechanism = ask(_site(HOST_BYTES, reuse=True), _traffic()), ask(_site(HOST_BYTES), _traffic())
    blocking, again = ask(_site(HOST_BYTES, as_vllm=True), _traffic()), ask(_site(0), _traffic())

    def ttft(slow: Totals, quick: Totals, share: float) -> float:
        return (slow.ttft_s.quantile(share) or 0.0) / (quick.ttft_s.quantile(share) or 1.0)

    return (
        *(ttft(blocking, whole, share) for share in (0.95, 0.99, 0.999)),
        (blocking.itl_s.quantile(0.999) or 0.0) / (whole.itl_s.quantile(0.999) or 1.0),
        whole.per_second()["output tokens"] / blocking.per_second()["output tokens"],
        *(ttft(blocking, mechanism, share) for share in (0.95, 0.999)),
        ttft(again, whole, 0.95),
        whole.ttft_s.quantile(0.95) or 0.0,
        blocking.ttft_s.quantile(0.95) or 0.0,
        blocking.spent.copy_s / blocking.busy_s,
        whole.spent.copy_s / whole.busy_s,
    )


CLAIMS = (
    Claim(
        name="fastswitch-tail",
        system="FastSwitch",
        paper=PAPER,
        says="The tail of TTFT (p95, p99, p99.9) is 1.4 to 5.8 times shorter than in vLLM 0.3.3, the p99.9 of the time "
        "between tokens up to 11.2 times, throughput up to 1.44 times.",
        source="the abstract and a reading note",
        setting=f"llama-3-8b in bf16 on an A10G with 60 GB of host memory; {CONVERSATIONS:,} conversations of 1 to 10 "
        f"turns with ShareGPT's lengths, begun so that there is one request a second; batch `prefill-first`, ordering "
        f"`markov` with {UPDATES} updates a step, preemption `swap`. vLLM: no KV kept between turns, copies block by "
        f"block before the work of a step, {LAUNCH_S * 1e6:.0f} us for each layer's keys and values.",
        fair="The ranges of TTFT are those of the paper. The two others count within half, and a fifth, of the claimed "
        "maximum, which was written down when the numbers were known; 100 conversations at five times the rate had "
        "been looked at before.",
        numbers=(
            Number("p95 TTFT, vLLM over FastSwitch", 1.4, Band(1.4, 5.8), MORE, "{:.1f}x"),
            Number("p99 TTFT", 5.8, Band(1.4, 5.8), MORE, "{:.1f}x"),
            Number("p99.9 TTFT", 5.8, Band(1.4, 5.8), MORE, "{:.1f}x"),
            Number("p99.9 time between tokens", 11.2, times(11.2), MORE, "{:.1f}x"),
            Number("throughput, FastSwitch over vLLM", 1.44, times(1.44, 1.2), MORE, "{:.2f}x"),
            Number("p95 TTFT, groups beside the work, without reuse", form="{:.2f}x"),
            Number("p99.9 TTFT, likewise", form="{:.2f}x"),
            Number("p95 TTFT of recomputing, over FastSwitch", form="{:.1f}x"),
            Number("p95 TTFT, FastSwitch", form="{:.1f} s"),
            Number("p95 TTFT, vLLM", form="{:.1f} s"),
            Number("time in copies that nothing hides, vLLM", form="{:.1%}"),
            Number("likewise, FastSwitch", form="{:.1%}"),
        ),
        obtain=_tail,
        because=(
            "One request a second is more than the modelled device serves if it computes every turn's history again, "
            "and less than it serves with FastSwitch: one queue grows for hours and the other does not, so the ratio "
            "is as large as the run is long. Without reuse between turns both grow, and the ratio is the paper's "
            "lower end.",
            "Whether a second brings one request or one conversation is not said where we read; nor how long users "
            "think, here not at all.",
            "Here KV of earlier turns is also found on the device, and by others who begin alike, which the paper's "
            "system does not do.",
            "The time between tokens counts the waits of those who were preempted, so most of its tail is priorities.",
            "A level of priority makes up for ten seconds of waiting, so that nobody starves; the paper's has no such "
            "bound.",
        ),
    ),
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
        fair="A closed form: t = copies x launch + bytes / bandwidth. `fastswitch-tail` asks what it does to the tail.",
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
