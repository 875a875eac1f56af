"""What a step computes: how its tokens are dealt to those who decode, those who catch up and those who wait. Each
former yields wishes and hears how many tokens each got; none keeps anything from step to step.
"""

from __future__ import annotations

from collections.abc import Generator

from headrace.engine.policies.joints import BatchView, RequestView, Share
from headrace.engine.policies.ordering import PRIORITY_LEVELS, level

_ALL = 1 << 40  # tokens: as many as there are


def chunked(batch: BatchView) -> Generator[Share, int, None]:
    """Decodes first and always, then unfinished prefills, then new requests, under the token budget: a decode never
    waits for a prompt, so the time between tokens is that of one budget (Sarathi-Serve's stall-free batching)."""
    left = batch.token_budget
    left -= yield Share(batch.decoding, len(batch.decoding))
    left -= yield Share(batch.prefilling, left)
    yield Share(batch.waiting, left)


def prefill_first(batch: BatchView) -> Generator[Share, int, None]:
    """Whole prompts as long as any may start, decodes only when none may (vLLM before 1.0): the soonest first token,
    paid for by everybody else's next one."""
    granted = yield Share(batch.prefilling, batch.token_budget, whole=True)
    granted += yield Share(batch.waiting, batch.token_budget - granted, whole=True)
    if not granted:
        yield Share(batch.decoding, len(batch.decoding))


def splitfuse(batch: BatchView) -> Generator[Share, int, None]:
    """Every step computes the same number of tokens (Dynamic SplitFuse, DeepSpeed-FastGen): tokens of decodes, then
    prompts, long ones split and short ones composed so that they fill it exactly. As `chunked`, but the budget is meant
    to be where the device saturates (`--token-budget`) and holds for decodes as well: beyond it, the last ones wait."""
    left = batch.token_budget
    left -= yield Share(batch.decoding, min(left, len(batch.decoding)))
    left -= yield Share(batch.prefilling, left)
    yield Share(batch.waiting, left)


def orca(batch: BatchView) -> Generator[Share, int, None]:
    """The batch is formed anew in each step (Orca, OSDI 2022): everybody who decodes, and whole prompts beside them, as
    many as admission and `max_running` allow. No budget bounds such a step, so decodes stall behind prompts. Orca also
    reserves the longest a request may become: admission `reserve-all`."""
    yield Share(batch.decoding, len(batch.decoding))
    yield Share(batch.prefilling, _ALL)
    yield Share(batch.waiting, _ALL)


def static(batch: BatchView) -> Generator[Share, int, None]:
    """A batch runs to its end before the next one starts (before Orca): prompts as long as any may start, then decodes
    only, until the longest answer is complete. A batch is closed by its first decode, that is when somebody has drawn
    two tokens. Answers are not held back until the end of the batch, and places of those who are done cost nothing."""
    if not any(one.known_tokens > one.prompt_tokens + 1 for one in batch.decoding):
        granted = yield Share(batch.prefilling, batch.token_budget, whole=True)
        granted += yield Share(batch.waiting, batch.token_budget - granted, whole=True)
        if granted:
            return
    left = batch.token_budget
    left -= yield Share(batch.decoding, len(batch.decoding))
    yield Share(batch.prefilling, left)


def filling(batch: BatchView) -> Generator[Share, int, None]:
    """Work that nobody waits for fills what others leave of a step (co-serving, FlexLLM): of the c tokens of others and
    s of filler, s is the most that keeps the step within the inter-token target, which is what the token budget is.

    Filler is a request of the lowest priority level: of a training sequence, the prompt is the tokens of the forward
    pass, computed window by window as there is room, with one new token. It starts only while nobody else waits.
    Others are served as in `chunked`; filler itself may starve, that is its purpose."""
    left = batch.token_budget
    left -= yield Share(batch.decoding, len(batch.decoding))
    serving = [one for one in batch.prefilling if not is_filler(one)]
    waiting = [one for one in batch.waiting if not is_filler(one)]
    left -= yield Share(serving, left)
    left -= yield Share(waiting, left)
    left -= yield Share([one for one in batch.prefilling if is_filler(one)], left)
    if not waiting:
        yield Share(batch.waiting, left)


def is_filler(request: RequestView) -> bool:
    return level(request) == -PRIORITY_LEVELS
