"""What a step computes: how its tokens are dealt to those who decode, those who catch up and those who wait. Each
former yields wishes and hears how many tokens each got; none keeps anything from step to step.
"""

from __future__ import annotations

from collections.abc import Generator

from headrace.engine.policies.joints import BatchView, Share
from headrace.engine.policies.ordering import is_filler

COHORT_TOKENS = 8192  # of prompts that go through the layers side by side
FILLER_SHARE = 8  # one part in so many of the token budget may be prompts of filler: who arrives waits no longer
_ALL = 1 << 40  # tokens: as many as there are


def chunked(batch: BatchView) -> Generator[Share, int, None]:
    """Decodes first and always, then unfinished prefills, then new requests, under the token budget: a decode never
    waits for a prompt, so the time between tokens is that of one budget (Sarathi-Serve's stall-free batching). New
    requests overtake the prefills that they precede in the ordering: else an urgent one would wait for the longest
    prompt that somebody else has begun.

    Filler is served behind all others, see `behind`; where there is none, nobody looks for it."""
    if batch.fillers:
        yield from behind(batch)
        return
    left = batch.token_budget
    left -= yield Share(batch.decoding, len(batch.decoding))
    if batch.overtaking:
        left -= yield Share(batch.overtaking, left)
    left -= yield Share(batch.prefilling, left)
    yield Share(batch.waiting, left)


def behind(batch: BatchView) -> Generator[Share, int, None]:
    """As `chunked`, with filler behind it. While anybody else has a prompt to compute, filler pauses, its decodes too.
    Otherwise it decodes beside the others, and its prompts go on in small pieces: whoever arrives finds a step in
    progress that is short, and the bound on the wait is 1 / FILLER_SHARE of the inter-token target. Filler may starve.
    """
    prefilling = [one for one in batch.prefilling if not is_filler(one)]
    waiting = [one for one in batch.waiting if not is_filler(one)]
    left = batch.token_budget
    if prefilling or waiting:
        decoding = [one for one in batch.decoding if not is_filler(one)]
        left -= yield Share(decoding, len(decoding))
        left -= yield Share([one for one in batch.overtaking if not is_filler(one)], left)
        left -= yield Share(prefilling, left)
        yield Share(waiting, left)
        return
    left -= yield Share(batch.decoding, len(batch.decoding))
    left = min(left, max(1, batch.token_budget // FILLER_SHARE))
    left -= yield Share(batch.prefilling, left)
    yield Share(batch.waiting, left)


def layered(batch: BatchView) -> Generator[Share, int, None]:
    """Decodes pass all L layers in every step, a prompt passes n of them whole, and the next n in the next step
    (layered prefill, arXiv:2510.08055): each layer of a mixture of experts loads its experts once for a prompt, not
    once for each chunk. Dense models gain nothing, nor do many decodes, for which all experts are loaded anyway.

        decodes + prompts * n / L <= token budget,   so n = floor(budget left * L / prompts), at least 1

    makes G = L / n groups, about prompts / budget (the paper: 1 for 512 tokens to 16 for 8192). What fits goes through
    all layers at once, as in `chunked`. Of what does not, one cohort of up to COHORT_TOKENS at a time, first come first
    served, and longer prompts in pieces of that. The bound: who comes next waits for G steps of decodes and cohort, and
    is in the cohort after it. Where plans cannot cut layers (`Capacity.layers` is 1) this is `chunked`."""
    left = batch.token_budget
    left -= yield Share(batch.decoding, len(batch.decoding))
    begun = [one for one in batch.prefilling if one.pending_tokens]
    left -= yield Share(begun or batch.prefilling, left, cohort=COHORT_TOKENS)
    if not any(one.pending_tokens for one in batch.prefilling):
        yield Share(batch.waiting, left, cohort=COHORT_TOKENS)


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
