"""How long real prompts and answers were: quantiles measured from published length lists. Data only.

Each list was sorted and read at LEVELS; `laws.corpus` draws between two quantiles on a straight line of the logarithm,
which gives the list's means back within 1 %. Prompt and answer are tied by the correlation of their ranks alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LEVELS = (
    *(0.0, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7),
    *(0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0),
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Quantiles in tokens at LEVELS, and the measured means to test them against."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    correlation: float  # of ranks (Spearman); as the parameter of the copula it is off by at most 0.02
    mean_prompt: float
    mean_output: float
    source: str


# fmt: off
CORPORA: Mapping[str, Corpus] = {
    "sharegpt": Corpus(
        prompt=(1, 2, 4, 6, 9, 11, 13, 15, 18, 21, 25, 29, 36, 45, 57, 76, 104, 153, 246, 429, 779, 1088, 1491, 2068,
                2471, 3030, 3447, 3909, 4096),
        output=(1, 5, 10, 20, 39, 71, 102, 130, 161, 193, 225, 253, 280, 309, 338, 369, 404, 445, 501, 573, 682, 759,
                845, 918, 954, 998, 1038, 1121, 1853),
        correlation=0.15, mean_prompt=257.3, mean_output=322.6,
        source="ShareGPT lengths published with NanoFlow (Zhu et al., 2024), 58,475 of 58,787 pairs: those with a "
               "prompt of at most 4,096 and an answer of at most 2,048 tokens",
    ),
    "azure-chat": Corpus(
        prompt=(2, 29, 120, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315,
                1876, 2734, 4075, 4083, 4090, 4098, 4142, 4831, 6179, 14050),
        output=(7, 16, 28, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424, 430, 451,
                509, 540, 601, 643, 954, 1000),
        correlation=0.07, mean_prompt=1154.7, mean_output=211.1,
        source="Azure LLM inference trace 2023, conversation, 19,366 requests (Patel et al., Splitwise, ISCA 2024; "
               "CC-BY-4.0)",
    ),
    "arxiv": Corpus(
        prompt=(1, 73, 331, 749, 1242, 1564, 1802, 1986, 2150, 2308, 2453, 2596, 2730, 2861, 2996, 3127, 3249, 3370,
                3490, 3597, 3702, 3759, 3813, 3863, 3892, 3933, 3963, 4012, 4054),
        output=(5, 36, 48, 60, 78, 92, 104, 115, 125, 135, 145, 156, 167, 179, 192, 206, 222, 242, 268, 304, 372, 438,
                736, 2200, 2775, 3271, 3582, 3844, 4056),
        correlation=-0.11, mean_prompt=2588.1, mean_output=291.4,
        source="arXiv summarization lengths published with Vidur (Agrawal et al., MLSys 2024), 28,257 requests",
    ),
}
# fmt: on
