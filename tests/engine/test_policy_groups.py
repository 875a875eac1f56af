"""BatchLLM: groups that save the most, in an order that keeps steps full, and what that is worth."""

from __future__ import annotations

import random
from collections.abc import Sequence

from engine_rig import Rig, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import View

from headrace.core import events
from headrace.core.config import EngineSettings
from headrace.core.keys import block_keys
from headrace.engine.policies.groups import PrefixGroups, prefix_groups


def saved(groups: dict[str, tuple[int, int]]) -> int:
    """Blocks that are not computed again: all but the first request of each group have the prefix."""
    return sum(blocks for _, blocks in groups.values()) - sum(dict(groups.values()).values())


def best(chains: dict[str, Sequence[int]]) -> int:
    """By trying: each set of requests below a node is one group there, or falls apart into those of its children."""

    def below(names: list[str], depth: int) -> int:
        children: dict[int, list[str]] = {}
        for name in names:
            if len(chains[name]) > depth:
                children.setdefault(chains[name][depth], []).append(name)
        return sum(max((len(some) - 1) * (depth + 1), below(some, depth + 1)) for some in children.values())

    return below(list(chains), 0)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=9))
def test_groups_save_as_many_blocks_as_any(contents: list[list[int]]) -> None:
    chains = {str(at): block_keys(content, 1, b"") for at, content in enumerate(contents)}
    groups = prefix_groups(chains)
    assert saved(groups) == best(chains)
    for name, (key, blocks) in groups.items():
        assert chains[name][blocks - 1] == key


def test_a_long_common_prefix_beats_a_short_wider_one() -> None:
    chains = {str(at): (1, *range(10 + 100 * (at // 2), 19 + 100 * (at // 2))) for at in range(4)}
    assert {blocks for _, blocks in prefix_groups(chains).values()} == {10}  # two groups: 10 + 10 saved, not 3
    assert prefix_groups({"a": (1, 2), "b": (1, 3), "c": (1, 4)}) == dict.fromkeys("abc", (1, 1))
    assert prefix_groups({"a": (1, 2), "b": ()}) == {}


def view(name: str, prompt: Sequence[int], new: int) -> View:
    request = make_request(name, prompt, new, block_tokens=4)
    return View(request, prompt_tokens=len(prompt), limit_tokens=len(prompt) + new)


def test_decode_heavy_groups_go_first_and_later_batches_later() -> None:
    policy = PrefixGroups(EngineSettings(block_tokens=4))
    requests = [view("p1", [1] * 40, 2), view("d1", [2] * 8, 30), view("p2", [1] * 40, 2), view("d2", [2] * 8, 30)]
    policy.survey(requests, 0.0)
    assert sorted("p1 d1 p2 d2".split(), key=lambda n: policy(next(r for r in requests if r.request.id == n), 0.0)) == [
        "d1",
        "d2",
        "p1",
        "p2",
    ]
    late = view("late", [3] * 8, 1000)
    policy.survey([*requests, late], 1.0)
    assert policy(late, 1.0) > max(policy(one, 1.0) for one in requests)
    for one in requests:
        one.running = True
    policy.survey([*requests, late], 2.0)
    even_later = view("even later", [3] * 8, 1000)
    assert policy(late, 2.0) < policy(even_later, 2.0)


def computed(ordering: str, documents: int, questions: int) -> float:
    """The share of prompt tokens that were not computed, when requests come shuffled and memory holds few documents."""
    rng = random.Random(1)
    asked = [(document, question) for document in range(documents) for question in range(questions)]
    rng.shuffle(asked)
    rig = Rig(8 * 17 + 24, 256, ordering=ordering, context=128, max_running=8, admission="conservative")
    for document, question in asked:
        prompt = [document] * 64 + [document, question, 7, question]
        rig.add(make_request(f"{document}/{question}", prompt, 2, block_tokens=4, arrival_s=0.0))
    rig.drain()
    cached = sum(event.cached_tokens for event in rig.recorder.of(events.Admitted))
    return cached / sum(request.prompt_tokens for request in rig.requests.values())


def test_documents_with_questions_are_computed_once() -> None:
    """As in the paper's micro-benchmark, scaled down: 32 documents with 8 questions each, memory for about eight
    documents. Group after group saves 1 - (32 * 64 + 256 * 4) / (256 * 68) = 82 %; first come, first served with an LRU
    cache finds a document again with probability about 8 / 32."""
    expected = 1 - (32 * 64 + 256 * 4) / (256 * 68)
    assert computed("prefix-groups", 32, 8) > expected - 0.02
    assert computed("fcfs", 32, 8) < 0.45
