"""What a step computes: how its tokens are dealt to those who decode, those who catch up and those who wait. Each
former yields wishes and hears how many tokens each got; none keeps anything from step to step.
"""

from __future__ import annotations

from collections.abc import Generator

from headrace.engine.policies.joints import BatchView, Share


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
