"""Past-Future (Gong et al., ASPLOS 2025; LightLLM): admission by the peak that memory is predicted to come to."""

from __future__ import annotations

from functools import partial

from headrace.core.config import EngineSettings
from headrace.sim.claims.claim import MORE, Band, Claim, Number
from headrace.sim.claims.setting import ask, counted, requests, uniform
from headrace.sim.stats import Totals

PAPER = "Gong et al., Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025"
SCALE = 16  # lengths and memory are that much smaller than in the paper's artifact
KV_TOKENS = 120_000 // SCALE
REQUESTS = 3000
Span = tuple[int, int]


def _run(admission: str, prompt: Span, output: Span) -> Totals:
    prompt, output = ((low // SCALE, high // SCALE) for low, high in (prompt, output))
    some = requests(uniform(prompt, output), REQUESTS, lambda prompt_tokens, new: output[1])
    site = counted(EngineSettings(admission=admission, max_running=1 << 12), KV_TOKENS)
    return ask(site, some)


def _used(totals: Totals) -> float:
    return totals.used_block_s / totals.busy_s / KV_TOKENS


def _obtain(prompt: Span, output: Span) -> tuple[float, ...]:
    ours, oracle, most, peak, least = (
        _run(admission, prompt, output)
        for admission in ("past-future", "oracle", "reserve-all", "conservative", "aggressive")
    )
    return (
        ours.steps / oracle.steps,
        ours.preemptions / REQUESTS,
        most.steps / ours.steps,
        peak.steps / ours.steps,
        least.preemptions / REQUESTS,
        least.steps / oracle.steps,
        _used(ours),
        _used(oracle),
        _used(most),
    )


def _claim(name: str, load: str, prompt: Span, output: Span, claimed: tuple[float, ...]) -> Claim:
    steps, evicted, gain, aggressive, fewest, used, used_oracle, used_most = claimed
    return Claim(
        name=name,
        system="Past-Future (LightLLM)",
        paper=PAPER,
        says=f"On {load} load, predicting from past lengths needs {100 * steps - 100:.1f} % more steps than an "
        f"oracle, evicts {evicted:.1%} of the requests, and needs {gain:.2f} times fewer steps than assuming the "
        "longest answers.",
        source="the artifact's behaviour scripts, run with a seed for the research notes",
        setting=f"{REQUESTS:,} requests at once, prompts of {prompt[0]} to {prompt[1]} and answers of {output[0]} to "
        f"{output[1]} tokens in {KV_TOKENS * SCALE:,} tokens of memory, all divided by {SCALE}; every step takes all "
        "tokens there are, so that prefill and eviction are free; window 1,000, 3 % reserved.",
        fair=f"Lengths and memory shrink alike, so batches are as large and steps {SCALE} times fewer. Blocks of one "
        "token keep the memory as fine.",
        numbers=(
            Number("steps over the oracle's", steps, Band(high=1.05), Band(high=1.15), "{:.3f}x"),
            Number("evictions per request", evicted, Band(high=0.10), Band(high=0.25), "{:.1%}"),
            Number("steps of the conservative (reserve-all) over its own", gain, Band(1.25), MORE, "{:.2f}x"),
            Number("steps of our own conservative over its own", form="{:.2f}x"),
            Number("evictions per request of the aggressive", aggressive, form="{:.1%}"),
            Number("steps of the aggressive over the oracle's", fewest, form="{:.3f}x"),
            Number("memory used", used, form="{:.1%}"),
            Number("memory used by the oracle", used_oracle, form="{:.1%}"),
            Number("memory used by the conservative", used_most, form="{:.1%}"),
        ),
        obtain=partial(_obtain, prompt, output),
        because=(
            "The artifact's conservative adds up prompt and longest answer of everybody, as our `reserve-all` does: "
            "120,000 tokens over its batch of 16 to 19 say so. Our own `conservative` looks for the peak in time, as "
            "Past-Future does, and is much closer; the first run of this claim compared with that one by mistake.",
            "The artifact admits every tenth step, we admit in each; it fills its history with guesses, while ours "
            "knows nothing but the limit until the first answers end.",
            "Ours draws by a golden-ratio sequence instead of at random, the same in every replay.",
            "Evictions cost nothing here. With the price of computing again, the aggressive one loses what it gains.",
            "One request may be evicted several times; the artifact counts requests, we count evictions.",
            "A window of past lengths is only worth something while lengths stay alike.",
        ),
    )


CLAIMS = (
    _claim(
        "past-future-decode-heavy",
        "decode-heavy",
        (32, 4096),
        (2048, 4096),
        (299_250 / 294_250, 0.088, 485_650 / 299_250, 0.937, 284_160 / 294_250, 0.933, 0.949, 0.578),
    ),
    _claim(
        "past-future-balanced",
        "balanced",
        (3000, 5000),
        (3000, 5000),
        (658_510 / 653_120, 0.071, 842_470 / 658_510, 0.977, 616_230 / 653_120, 0.916, 0.926, 0.717),
    ),
    _claim(
        "past-future-prefill-heavy",
        "prefill-heavy",
        (2048, 4096),
        (32, 4096),
        (241_720 / 230_690, 0.029, 374_250 / 241_720, 0.343, 227_250 / 230_690, 0.945, 0.966, 0.597),
    ),
)
