"""What an API's latencies say about the model behind it (Narayanan et al., 2023): T = F(prompt) + g (tokens - 1),
fitted to the least of repeated measurements, beside what a model on some hardware would take without contention.

    runs (prompt, output, seconds) --least of equal ones--> F, g --over--> those of MODEL on D = what is not the model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from headrace.core.config import BadSetting
from headrace.sim.cost.batch import CostModel, batch_of
from headrace.sim.cost.idealized import Idealized, Run, fit_idealized
from headrace.sim.plan.answer import Answer, Part

MOST_RUNS = 100_000
MOST_KNOTS = 11


@dataclass(frozen=True, slots=True)
class Api:
    """A fit, and how good it is."""

    runs: tuple[Run, ...]  # the least of each size
    fitted: Idealized
    r2: float
    median_error: float
    hardware: Idealized | None  # of the model that was named
    usd_per_hour: float | None  # of its devices

    @property
    def ratios(self) -> list[tuple[int, int, float, float]]:
        """(prompt, output, seconds of the API, seconds of the hardware alone)."""
        if self.hardware is None:
            return []
        return [(p, o, seconds, self.hardware.runtime_s(p, o)) for p, o, seconds in self.runs]


def read(text: str) -> list[Run]:
    """Lines of prompt tokens, output tokens and seconds; a first line of names is skipped. Raises BadSetting."""
    found: list[Run] = []
    for number, line in enumerate(text.splitlines()[: MOST_RUNS + 1]):
        cells = line.replace(";", ",").split(",")
        try:
            prompt, output, seconds = int(cells[0]), int(cells[1]), float(cells[2])
        except (ValueError, IndexError) as error:
            if number == 0 or not line.strip():
                continue
            raise BadSetting(f"line {number + 1} is not PROMPT_TOKENS,OUTPUT_TOKENS,SECONDS: {line[:80]!r}") from error
        if not (0 < prompt <= 10_000_000 and 0 < output <= 10_000_000 and 0 < seconds < 1e6):
            raise BadSetting(f"line {number + 1} has a number out of bounds: {line[:80]!r}")
        found.append((prompt, output, seconds))
    return found


def denoised(runs: Sequence[Run]) -> list[Run]:
    """The least of those of one size: contention only adds."""
    least: dict[tuple[int, int], float] = {}
    for prompt, output, seconds in runs:
        least[prompt, output] = min(seconds, least.get((prompt, output), seconds))
    return [(prompt, output, seconds) for (prompt, output), seconds in sorted(least.items())]


def api(runs: Sequence[Run], cost: CostModel | None, windows: tuple[int, ...], usd_per_hour: float | None) -> Api:
    """Raises BadSamples for runs that do not tell F from g."""
    kept = denoised(runs)
    knots = sorted({prompt for prompt, _, _ in kept})
    if len(knots) > MOST_KNOTS:
        near = [knots[round(at * (len(knots) - 1) / (MOST_KNOTS - 1))] for at in range(MOST_KNOTS)]
        kept = [run for run in kept if run[0] in near]
    fitted = fit_idealized(kept)
    mean = sum(seconds for *_, seconds in kept) / len(kept)
    left = sum((seconds - fitted.runtime_s(p, o)) ** 2 for p, o, seconds in kept)
    spread = sum((seconds - mean) ** 2 for *_, seconds in kept)
    errors = sorted(abs(fitted.runtime_s(p, o) / seconds - 1) for p, o, seconds in kept)
    hardware = None if cost is None else ideal(cost, windows, [prompt for prompt, _, _ in kept])
    r2 = 1 - left / spread if spread else 1.0
    return Api(tuple(kept), fitted, r2, errors[len(errors) // 2], hardware, usd_per_hour)


def ideal(cost: CostModel, windows: tuple[int, ...], prompts: Sequence[int]) -> Idealized:
    """A model alone on its hardware, by its price of steps."""
    knots = sorted(set(prompts))
    first = [cost.estimate(batch_of([(0, prompt)], 1, windows)).seconds for prompt in knots]
    middle = knots[len(knots) // 2]
    return Idealized(tuple(knots), tuple(first), cost.estimate(batch_of([(middle, 1)], 1, windows)).seconds)


def answer(found: Api, subject: str) -> Answer:
    fitted = found.fitted
    rows = [["prompt tokens", "F, s", *(["on that hardware, s"] if found.hardware else [])]]
    for at, prompt in enumerate(fitted.prompt_tokens):
        more = [f"{found.hardware.first_token_s(prompt):.3f}"] if found.hardware else []
        rows.append([f"{prompt:,}", f"{fitted.prompt_s[at]:.3f}", *more])
    return Answer(
        "An API's idealized runtime",
        tuple(_headline(found, subject)),
        (Part("Time to the first token", "Fitted at every prompt length that was measured.", rows),),
        (),
        (
            "F and g are fitted to the least of repeated runs: what remains is whatever never goes away.",
            f"Half of the runs are within {found.median_error:.1%} of the fit. What the API runs on is not known; the",
            "hardware's side is the cost model at catalogue peaks, alone: if its bandwidth is 10 % off,",
            "so is its g.",
        ),
        ("T(p, o) = F(p) + g (o - 1), non-negative least squares over all runs", *_work(found)),
        {"fit": asdict(fitted), "r2": found.r2, "median_error": found.median_error, "runs": found.ratios},
    )


def _headline(found: Api, subject: str) -> Iterator[str]:
    fitted = found.fitted
    yield (
        f"{1e3 * fitted.token_s:.1f} ms a token ({1 / max(fitted.token_s, 1e-9):,.0f} tokens/s), "
        f"{fitted.prompt_s[0]:.2f} s to the first token of the shortest prompt; R^2 {found.r2:.4f}."
    )
    if found.hardware is not None:
        times = sorted(mine / theirs for _, _, mine, theirs in found.ratios)
        yield f"  {subject} alone would take {1 / times[len(times) // 2]:.2f} of that time (median over the runs)."
    if found.usd_per_hour is not None and found.ratios:
        seconds = sum(theirs for *_, theirs in found.ratios) / len(found.ratios)
        yield f"  A mean run would cost ${seconds * found.usd_per_hour / 3600:.5f} of such devices, unshared."


def _work(found: Api) -> Iterator[str]:
    for prompt, output, seconds in found.runs[:12]:
        at = found.fitted
        yield (
            f"  {prompt} + {output}: {at.first_token_s(prompt):.3f} + {at.token_s:.5f} x {output - 1} = "
            f"{at.runtime_s(prompt, output):.3f} s, measured {seconds:.3f}"
        )
