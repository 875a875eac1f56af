"""Policies alone: what each small function says about made-up views."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import View, arriving, play, pool

from headrace.core.config import EngineSettings
from headrace.core.types import HeadraceError
from headrace.engine.policy import (
    ADMISSIONS,
    AGEING_S,
    BATCHES,
    ORDERINGS,
    PREEMPTIONS,
    PRIORITY_LEVELS,
    BatchView,
    Share,
    choose,
    chunked,
    fcfs,
    free_blocks,
    last_arrived,
    prefill_first,
    priority,
    reserve_all,
    token_budget,
)

BATCH = BatchView(0.0, 32, [View()] * 3, [View()], [View()] * 2)


def test_fcfs_is_arrival() -> None:
    assert fcfs(arriving(1.0), 9.0) < fcfs(arriving(2.0), 9.0)


@settings(derandomize=True, deadline=None)
@given(st.integers(), st.integers(), st.floats(0, 1e6), st.floats(0, 1e6))
def test_priority_keeps_its_bound(level: int, rival: int, arrival_s: float, later_s: float) -> None:
    """Equal levels go by arrival, more goes first at once, and nothing overtakes beyond the stated bound."""
    mine, theirs = priority(arriving(arrival_s, level), 0.0), priority(arriving(arrival_s + later_s, rival), 0.0)
    if later_s > 2 * PRIORITY_LEVELS * AGEING_S or (level == rival and later_s > 1e-3):
        assert mine < theirs
    if later_s == 0 and -PRIORITY_LEVELS <= level < rival <= PRIORITY_LEVELS:
        assert theirs < mine


def test_free_blocks_counts_promises_hits_and_the_watermark() -> None:
    request = View(known_tokens=10)  # three blocks
    assert free_blocks(request, pool(free_blocks=4))
    assert not free_blocks(request, pool(free_blocks=3))
    assert free_blocks(View(known_tokens=10, cached_blocks=1), pool(free_blocks=3))
    assert not free_blocks(request, pool(free_blocks=5, promised_blocks=2))


def test_reserve_all_counts_the_longest_of_everybody() -> None:
    request = View(limit_tokens=20)  # the last token is never computed: 19 tokens, five blocks
    assert reserve_all(request, pool(reserved_blocks=95))
    assert not reserve_all(request, pool(reserved_blocks=96))


def test_chunked_gives_decodes_what_they_need_and_prompts_the_rest() -> None:
    shares = play(chunked(BATCH), [3, 20])
    assert [share.tokens for share in shares] == [3, 29, 9]
    assert [share.requests for share in shares] == [BATCH.decoding, BATCH.prefilling, BATCH.waiting]
    crowded = BATCH._replace(token_budget=2)
    assert [share.tokens for share in play(chunked(crowded), [3, 0])] == [3, -1, -1]


def test_prefill_first_decodes_only_when_no_prompt_may_start() -> None:
    assert len(play(prefill_first(BATCH), [0, 12])) == 2
    shares = play(prefill_first(BATCH), [0, 0, 3])
    assert shares[-1] == Share(BATCH.decoding, 3)
    assert all(share.whole for share in shares[:2])


def test_last_arrived_yields() -> None:
    behind = [arriving(1.0), arriving(2.0)]
    needy = arriving(0.0)
    assert last_arrived(behind, needy) is None
    needy.running = True
    assert last_arrived(behind, needy) is behind[1]


@settings(derandomize=True, deadline=None)
@given(st.floats(0.001, 10), st.floats(0, 1), st.floats(1e-6, 0.1))
def test_token_budget_is_the_largest_that_keeps_the_target(target_s: float, base_s: float, each_s: float) -> None:
    tokens = token_budget(target_s, base_s, each_s, floor=16, ceiling=8192)
    assert 16 <= tokens <= 8192
    if tokens > 16:
        assert base_s + tokens * each_s <= target_s * (1 + 1e-9)
    if tokens < 8192:
        assert base_s + (tokens + 1) * each_s > target_s * (1 - 1e-9)


def test_token_budget_of_a_device_without_cost_is_the_ceiling() -> None:
    assert token_budget(0.1, 0.0, 0.0, ceiling=99) == 99


@pytest.mark.parametrize(
    ("setting", "names"),
    {"ordering": ORDERINGS, "admission": ADMISSIONS, "batch": BATCHES, "preemption": PREEMPTIONS}.items(),
)
def test_the_help_of_a_setting_names_its_policies(setting: str, names: Mapping[str, object]) -> None:
    text = EngineSettings.__dataclass_fields__[setting].metadata["help"]
    assert set(names) <= set(re.split(r"[^a-z-]+", text))


@pytest.mark.parametrize("setting", ["ordering", "admission", "batch", "preemption"])
def test_an_unknown_name_lists_the_known_ones(setting: str) -> None:
    assert choose(EngineSettings())
    with pytest.raises(HeadraceError, match=f"{setting} 'nonsense' is unknown; choose one of "):
        choose(EngineSettings(**{setting: "nonsense"}))
