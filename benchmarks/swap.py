"""What preemption by swap saves, for real: a request of some context is thrown out and goes on, with its KV copied back
from the host, or computed again. CPU seconds from the preemption to the next token, the least of several.

    python benchmarks/swap.py [MODEL] [--contexts 256 1024 4096] [--rounds 3]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from time import process_time

from headrace.cli.assemble import Phases, open_model
from headrace.core.config import Bytes, DeviceSettings, EngineSettings, format_bytes
from headrace.core.events import Event
from headrace.core.step import DEVICE, HOST
from headrace.core.types import Request, Sampling, Tokens
from headrace.device.executor import ModelExecutor
from headrace.device.load import load
from headrace.engine.scheduler import Scheduler

SETTINGS = EngineSettings(prefix_cache=False)  # so that what is not copied back is computed again
BLOCK_TOKENS = SETTINGS.block_tokens


class _Deaf:
    def observe(self, event: Event) -> None:
        return


class Round:
    """One request that is preempted once."""

    def __init__(self, executor: ModelExecutor, swaps: bool, tokens: int) -> None:
        capacity = executor.capacity if swaps else replace(executor.capacity, host_blocks=0)
        self._executor = executor
        self._scheduler = Scheduler(SETTINGS, capacity, token_budget=512, observer=_Deaf())
        self.copied = {DEVICE: 0, HOST: 0}
        prompt = tuple(at % 1000 for at in range(tokens))
        self._scheduler.add(Request("one", (Tokens(prompt),), 0.0, 8, Sampling(temperature=0.0)), 0.0)

    def run(self) -> tuple[float, list[int]]:
        """(CPU seconds from the preemption to the next token, all tokens)."""
        ids = self._until_a_token()
        begun_s = process_time()
        self._scheduler._planner.preempt(self._scheduler._lines.live["one"], 0.0, "to measure")
        ids += self._until_a_token()
        seconds = process_time() - begun_s
        while self._scheduler.live or self._scheduler.used_blocks:
            ids += self._until_a_token()
        while (plan := self._scheduler.plan(0.0)) is not None:
            self._scheduler.commit(self._executor.step(plan), 0.0)
        return seconds, ids

    def _until_a_token(self) -> list[int]:
        while (plan := self._scheduler.plan(0.0)) is not None:
            for copy in plan.copies:
                self.copied[copy.target_tier] += len(copy.pairs)
            outputs = self._scheduler.commit(self._executor.step(plan), 0.0)
            if ids := [token for output in outputs for token in output.token_ids]:
                return ids
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    longest = max(args.contexts) + 64
    device = DeviceSettings(
        dtype="fp32", device="cpu", max_context=longest, kv_memory=Bytes(1 << 30), threads=args.threads
    )
    checkpoint = open_model(args.model, phase := Phases())
    executor = load(checkpoint, device, BLOCK_TOKENS, 4, phase, host_bytes=1 << 30).executor
    phase.done()
    tier = executor.capacity
    print(
        f"{Path(args.model).name}: {tier.host_blocks} host blocks, {tier.least_copied_blocks} at least are worth a copy"
    )
    print(f"{'context':>8} {'swap ms':>10} {'again ms':>10} {'ratio':>8}  copied in")
    for tokens in args.contexts:
        seconds, copied, answers = {}, 0, []
        for swaps in (True, False):
            times = []
            for _ in range(args.rounds):
                one = Round(executor, swaps, tokens)
                took_s, ids = one.run()
                times.append(took_s)
                answers.append(ids)
                copied = max(copied, one.copied[DEVICE])
            seconds[swaps] = min(times)
        assert all(ids == answers[0] for ids in answers), "tokens tell what was swapped"
        nbytes = format_bytes(copied * executor.shape.layers * executor.shape.kv_width * 4 * BLOCK_TOKENS)
        print(
            f"{tokens:>8} {1e3 * seconds[True]:>10.1f} {1e3 * seconds[False]:>10.1f}"
            f" {seconds[False] / seconds[True]:>7.1f}x  {nbytes}",
            flush=True,
        )


if __name__ == "__main__":
    main()
