"""Events of a real scheduler in, words out: who waited for whom, told to each viewer as much as is theirs to know."""

from __future__ import annotations

import random

from engine_rig import Rig, make_request

from headrace.core.explain import seen, told, words
from headrace.core.explain.fold import Explanations
from headrace.core.explain.told import Explanation, Viewer
from headrace.core.types import RequestId


class Told:
    """A rig whose scheduler is explained."""

    def __init__(self, keep: int = 100, **options: object) -> None:
        self.book = Explanations(keep)
        self.rig = Rig(**options)  # type: ignore[arg-type]
        self.rig.recorder.then = self.book.observer("rote")

    def run(self, most: int = 500) -> None:
        for _ in range(most):
            if not self.rig.scheduler.live:
                return
            self.rig.step()
            self.book.check()
        raise AssertionError("it does not end")

    def explain(self, name: RequestId, viewer: Viewer = Viewer()) -> Explanation:  # noqa: B008
        record = self.book.find(name)
        assert record is not None
        return told.explain(self.book, record, viewer, self.rig.now)


def ids(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(10, 60), k=tokens)


def test_a_request_delayed_by_another_tenants_long_prompt_is_told_so_in_words() -> None:
    """Must show 5: at 4 tokens a step a prompt of 60 takes 15 steps of a second, a second apart."""
    run = Told(budget=4, context=128, blocks=64)
    run.rig.add(make_request("long", ids(1, 60), tenant="alice"))
    run.rig.step()
    run.rig.add(make_request("short", ids(2, 5), tenant="bob"))
    run.run()
    one = run.explain("short", Viewer("bob"))
    (sentence, *_) = words.tell(one)
    assert sentence == (
        "It waited 29.0 s in the queue while 1 request ran: 14.0 s of it while a prompt of 60 tokens of another tenant "
        "was computed."
    )
    assert "alice" not in " ".join(words.tell(one)) and "long" not in repr(one)
    admin = words.tell(run.explain("short", Viewer(admin=True)))
    assert "a prompt of 60 tokens of tenant alice (long) was computed" in admin[0]


def test_why_a_prompt_was_not_in_the_cache() -> None:
    run = Told(blocks=16, context=64)
    prompt = ids(3, 17)
    for name, text, salt in (("first", prompt, b""), ("again", prompt, b""), ("salted", prompt, b"x")):
        run.rig.add(make_request(name, text, max_new_tokens=2, salt=salt))
        run.run()
    assert run.explain("first").missed == seen.FIRST
    assert (run.explain("again").missed, run.explain("again").cached_tokens) == (seen.WHOLE, 16)
    assert run.explain("salted").missed == seen.OTHER_SALT
    for seed in range(4):
        run.rig.add(make_request(f"other{seed}", ids(100 + seed, 40), max_new_tokens=2))
        run.run()
    run.rig.add(make_request("late", prompt, max_new_tokens=2))
    run.run()
    assert run.explain("late").missed == seen.EVICTED
    run.rig.add(make_request("tiny", ids(4, 3), max_new_tokens=2))
    run.run()
    assert run.explain("tiny").missed == seen.UNNAMED
