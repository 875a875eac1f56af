"""The scheduler against the strict executor: what one scenario at a time must do."""

from engine_rig import Rig, make_request

from headrace.core.types import FinishReason


def test_one_request_runs_to_its_length() -> None:
    rig = Rig()
    rig.add(make_request("a", range(10), 5))
    rig.drain()
    assert rig.finish("a") is FinishReason.LENGTH
    assert len(rig.tokens("a")) == 5


def test_equal_prompts_compute_the_prefix_about_once() -> None:
    for budget in (7, 16, 33, 64, 1000):
        rig = Rig(blocks=512, budget=budget, context=200)
        rig.add(*(make_request(str(n), [*range(100), n], 2) for n in range(32)))
        rig.drain()
        assert rig.executor.computed_tokens <= 100 + 32 * 6, budget
