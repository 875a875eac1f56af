"""Claims: how numbers become verdicts and verdicts become pages, and that cheap claims still come out as documented."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from headrace.cli import main, reproduce
from headrace.core.config import EngineSettings
from headrace.engine.policies.deadlines import mdd, mddc
from headrace.sim.claims import CLAIMS, NOT_YET, due_dates, fair_share, layered, nanoflow, setting, told
from headrace.sim.claims.claim import LESS, MORE, Band, Claim, Number, Verdict, times
from headrace.sim.cost.operators import expected_experts
from headrace.sim.models import model

PAGE = Path(__file__).parent.parent.parent / "docs" / "claims.md"
CHEAP = (  # together a few seconds
    "orca-offline",
    "sarathi-chunk-overhead",
    "sarathi-stall",
    "splitfuse-even-steps",
    "batchllm-sharing",
    "mddc-case",
    "mddc-gaps",
    "eddc-gap",
    "layered-prefill-traffic",
    "layered-prefill-latency",
    "nanoflow-bound",
    "nanoflow-overlap",
    "nanoflow-headline",
    "nanoflow-splitting",
    "tokenweave-prefill",
    "fastswitch-copies",
    "paging-memory",
)


def claim(*numbers: Number, name: str = "one") -> Claim:
    return Claim(name, "System", "Paper", "Says.", "source", "Setting.", "Fair.", numbers, lambda: (), ("Reason.",))


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (2.0, Verdict.REPRODUCED),
        (3.0, Verdict.REPRODUCED),
        (3.1, Verdict.PARTLY),
        (1.2, Verdict.PARTLY),
        (0.9, Verdict.NOT),
        (math.nan, Verdict.NOT),
    ],
)
def test_one_number_is_judged_by_its_size_and_then_by_its_direction(value: float, verdict: Verdict) -> None:
    assert claim(Number("gain", 2.6, Band(2.0, 3.0), MORE)).judge([value]) is verdict


def test_the_worst_number_decides_and_numbers_that_are_shown_only_do_not() -> None:
    gain, shrink, shown = (
        Number("gain", 2.0, Band(1.5), MORE),
        Number("less", 0.5, Band(high=0.6), LESS),
        Number("seen"),
    )
    both = claim(gain, shrink, shown)
    assert both.judge([2.0, 0.5, math.nan]) is Verdict.REPRODUCED
    assert both.judge([2.0, 0.9, 0.0]) is Verdict.PARTLY
    assert both.judge([2.0, 1.1, 0.0]) is Verdict.NOT
    with pytest.raises(ValueError, match="zip"):
        both.judge([2.0, 0.5])


def test_bands_are_told_as_they_judge() -> None:
    def number(band: Band | None) -> str:
        return Number("n", None, band, form="{:.1f}x").bounds

    assert number(Band(1.0, 2.0)) == "1.0x to 2.0x"
    assert number(Band(3.0)) == "at least 3.0x"
    assert number(Band(high=3.0)) == "at most 3.0x"
    assert number(Band(3.0, 3.0)) == "3.0x"
    assert number(None) == "shown only"
    assert times(3.0, 1.5) == Band(2.0, 4.5)


# -- the collection ----------------------------------------------------------------------------------------------------


def test_every_claim_says_what_a_reader_needs_and_can_fail() -> None:
    assert len(CLAIMS) >= 18
    for name, one in CLAIMS.items():
        assert name == one.name and re.fullmatch(r"[a-z0-9-]+", name)
        assert one.because
        for words in (one.says, one.setting, one.fair, *one.because):
            assert words.endswith((".", ".)")), f"{name}: {words}"
        judged = [number for number in one.numbers if number.counts]
        assert judged, f"{name} judges nothing"
        for number in judged:
            assert number.counts is not None and number.counts.low <= number.counts.high
            assert number.counts != Band(), f"{name}: {number.what} cannot fail"
            if number.claimed is not None and number.counts.low == number.counts.high:
                assert number.claimed == number.counts.low


def test_the_claims_of_systems_without_a_joint_are_listed_as_missing() -> None:
    systems = {one.system for one in NOT_YET}
    assert {"DistServe", "Llumnix", "semi-PD"} <= systems
    assert all(one.says and one.missing for one in NOT_YET)


def documented(name: str) -> str:
    """The verdict of a claim on the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n### {name}\n")[1]
    verdict = re.search(r"^\*\*(.+?)\*\*", section, re.MULTILINE)
    assert verdict is not None
    return verdict[1]


def test_the_page_has_every_claim_and_every_verdict_it_counts() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert told.COMMAND in text
    assert re.findall(r"^### (.+)$", text, re.MULTILINE) == list(CLAIMS)
    verdicts = [documented(name) for name in CLAIMS]
    for verdict in Verdict:
        count = verdicts.count(verdict.value)
        assert not count or f"{count} {verdict.value}" in " ".join(text.split())


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_claims_come_out_as_documented(name: str) -> None:
    values = CLAIMS[name].obtain()
    assert CLAIMS[name].judge(values).value == documented(name), f"run `{told.COMMAND}`"


# -- pages and the command ---------------------------------------------------------------------------------------------


def test_a_page_is_made_of_what_was_obtained() -> None:
    one, two = claim(Number("gain", 2.0, Band(1.5), MORE, "{:.1f}x")), claim(Number("seen", 1.0, Band(9.0)), name="two")
    page = told.page([one, two], {"one": [1.7], "two": [0.0]}, NOT_YET[:1])
    assert "2 claims: 1 reproduced, 1 partly reproduced" in " ".join(page.split())
    assert "| gain | 2.0x | at least 1.5x | 1.7x |" in page
    assert page.count("## System\n") == 1 and "- Reason." in page
    assert page == told.page([one, two], {"one": [1.7], "two": [0.0]}, NOT_YET[:1])


def test_without_a_name_the_claims_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CLAIMS)


def test_a_claim_is_run_and_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "claims.md"
    assert main(["reproduce", "mddc-case", "nanoflow-bound", "--processes", "1", "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    assert "mddc-case: REPRODUCED" in out and "141" in out and "setting" in out and "differs" in out
    assert "2 claims in " in out
    assert re.findall(r"^### (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE) == ["mddc-case", "nanoflow-bound"]


def test_an_unknown_name_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "sarathi-chat"]) == 2
    assert "sarathi-chat-strict" in capsys.readouterr().err
    assert main(["reproduce", "mddc-case", "--markdown", "/nowhere/claims.md"]) == 2


def test_all_is_all_in_order() -> None:
    assert [one.name for one in reproduce.chosen(["all"])] == list(CLAIMS)
    assert [one.name for one in reproduce.chosen(["vtc-bound", "mddc-case", "vtc-bound"])] == ["vtc-bound", "mddc-case"]


# -- what the settings are made of -------------------------------------------------------------------------------------


def test_a_bisection_finds_the_highest_rate() -> None:
    assert setting.highest(lambda rate: rate <= 3.0, 0.05, 8.0) == pytest.approx(3.0, rel=0.02)
    assert setting.highest(lambda rate: True, 0.05, 8.0) == 8.0
    assert setting.highest(lambda rate: False, 0.05, 8.0) == 0.05


def test_requests_differ_between_rates_in_nothing_but_time() -> None:
    some = setting.requests(setting.uniform((10, 20), (5, 9)), 50, setting.exactly)
    slow, fast = setting.poisson(some, 1.0), setting.poisson(some, 4.0)
    for one, other in zip(slow, fast, strict=True):
        assert one.at_s == pytest.approx(4 * (other.at_s or 0))
        assert replace(one, at_s=0.0) == replace(other, at_s=0.0)


def test_lengths_have_the_published_quantiles() -> None:
    lengths, rng = setting.log_normal((1000, 3000), (100, 400), 1 << 20), Random(0)
    prompts, outputs = (sorted(side) for side in zip(*(lengths(rng) for _ in range(20_000)), strict=True))
    assert prompts[10_000] == pytest.approx(1000, rel=0.03) and prompts[18_000] == pytest.approx(3000, rel=0.05)
    assert outputs[10_000] == pytest.approx(100, rel=0.03) and outputs[18_000] == pytest.approx(400, rel=0.05)


def test_a_counted_site_takes_one_step_for_each_token_of_an_answer() -> None:
    some = setting.requests(setting.uniform((5, 5), (7, 7)), 3, setting.exactly)
    steps = setting.Steps()
    totals = setting.ask(setting.counted(EngineSettings(), 100), some, steps)
    assert totals.span_s == 8 and not totals.preemptions  # the first begins alone, before the others have come
    assert steps.running == (1 + 7 * 3 - 1) / 8 and steps.busy_s == 8
    assert setting.per_token_s(totals) == [7 / 7, 8 / 7, 8 / 7]
    alone = setting.ask(setting.counted(EngineSettings(admission="reserve-all"), 12), some)
    assert alone.span_s == 21


def test_means_and_deviations_are_weighted() -> None:
    assert setting.mean_and_deviation([(1.0, 3.0), (5.0, 1.0)]) == pytest.approx((2.0, 3**0.5))


def test_service_counts_what_each_tenant_was_served() -> None:
    some = setting.requests(setting.uniform((10, 10), (4, 4)), 4, setting.exactly)
    served = fair_share.Served(until_s=1e9)
    setting.ask(
        setting.counted(EngineSettings(), 1000),
        [replace(one, tenant="one" if number else "two") for number, one in enumerate(some)],
        served,
    )
    assert served.cost == {"one": 3 * (10 + 2 * 4), "two": 10 + 2 * 4}
    assert served.largest >= 2 * (10 + 2 * 4)


def test_the_optimum_is_that_of_all_orders() -> None:
    def late(order: tuple[int, ...], instance: due_dates.Instance) -> float:
        ends = itertools.accumulate(instance.service[at] for at in order)
        return sum(max(0.0, end - instance.due[at]) for at, end in zip(order, ends, strict=True))

    rng = Random(1)
    for _ in range(5):
        service = tuple(float(rng.randint(1, 20)) for _ in range(6))
        instance = due_dates.Instance(service, tuple(rng.uniform(0, 60) for _ in range(6)))
        best = min(late(order, instance) for order in itertools.permutations(range(6)))
        assert due_dates.optimum(instance) == pytest.approx(best)
        assert min(due_dates.tardiness(instance, rule) for rule in (mdd, mddc)) >= best - 1e-9


def test_drawn_experts_agree_with_the_closed_form() -> None:
    shape = model("qwen3-30b-a3b")
    counts = (4, 16, 64)
    even, skewed = layered._drawn(shape, 0.0, counts), layered._drawn(shape, 1.5, counts)
    for tokens in counts:
        assert even[tokens] == pytest.approx(expected_experts(tokens, 128, 8), rel=0.03)
        assert skewed[tokens] < even[tokens]


def test_a_steady_step_has_as_many_tokens_as_it_says() -> None:
    for prompt, output in (*nanoflow.LENGTHS.values(), (512, 1), (512, 512)):
        batch = nanoflow.steady(prompt, output, kv_tokens=10_000_000)
        assert batch.tokens == nanoflow.DENSE
        assert batch.decodes / batch.tokens == pytest.approx(output / (prompt + output), abs=0.01)
        tight = nanoflow.steady(prompt, output, kv_tokens=2 * (prompt + output))
        assert 0 < tight.full.decode_context <= 2 * (prompt + output) and tight.tokens < nanoflow.DENSE
