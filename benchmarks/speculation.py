"""What drafts gain and what they cost: output tokens per second with `--speculate lookup` over those without, for
answers that repeat their prompt and for answers that do not, at 1, 8 and 32 requests side by side.

One model, one process, the real scheduler and executor without a server in between; rounds alternate, ratios are of
medians. Tokens are compared: they must be the same.

    python benchmarks/speculation.py [--model smollm2] [--rounds 3] [--tokens 96] [--concurrent 1 8 32]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median

from headrace.cli.assemble import Phases, open_model, text_of
from headrace.core import clock
from headrace.core.config import DeviceSettings, EngineSettings
from headrace.core.metrics import Metrics
from headrace.core.ports import Executor
from headrace.core.types import Request, Sampling, Tokens
from headrace.device.load import load
from headrace.engine.scheduler import Scheduler

THINGS = ("hammer", "saw", "file", "plane", "chisel", "rule", "clamp", "drill", "brush", "square")
LIST = "\n".join(f"{at}. The {name} is kept in drawer {at * 7 % 12}." for at, name in enumerate(THINGS, 1))
TASKS = {
    "repeats": f"This list was written down twice, word by word.\n\nFirst time:\n{LIST}\n\nSecond time:\n1. The",
    "free": "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who",
}
OFF, ON = EngineSettings(prefix_cache=False), EngineSettings(prefix_cache=False, speculate="lookup")

Answers = dict[str, list[int]]


async def run(executor: Executor, settings: EngineSettings, requests: list[Request]) -> tuple[float, Answers, Metrics]:
    """(output tokens per second, the answers, what was counted) of requests that come at once."""
    metrics, answers = Metrics(), {request.id: list[int]() for request in requests}
    scheduler = Scheduler(settings, executor.capacity, token_budget=512, observer=metrics)
    begun_s = clock.perf()
    for request in requests:
        scheduler.add(request, begun_s)
    while (plan := scheduler.plan(clock.perf())) is not None:
        for output in scheduler.commit(await executor.run(plan), clock.perf()):
            answers[output.request_id] += output.token_ids
    return metrics.output_tokens / (clock.perf() - begun_s), answers, metrics


async def compare(executor: Executor, task: str, ids: tuple[int, ...], args: argparse.Namespace, count: int) -> None:
    one = Request("", (), 0.0, args.tokens, Sampling(temperature=0))
    requests = [replace(one, id=str(at), prompt=(Tokens((ids[at % 7 + 1], *ids)),)) for at in range(count)]
    off, on = list[float](), list[float]()
    for _ in range(args.rounds):
        rate, expected, _ = await run(executor, OFF, requests)
        off.append(rate)
        rate, found, metrics = await run(executor, ON, requests)
        on.append(rate)
        assert found == expected, "drafts changed an answer"
    right = f"{metrics.accepted_tokens} of {metrics.drafted_tokens} drafts accepted"
    print(
        f"{task:8} {count:3} concurrent: {median(off):7.1f} -> {median(on):7.1f} tokens/s, "
        f"ratio {median(on) / median(off):.2f}, {right}",
        flush=True,
    )


async def measure(args: argparse.Namespace) -> None:
    phase = Phases()
    checkpoint = open_model(args.model, phase)
    executor = load(checkpoint, DeviceSettings(), OFF.block_tokens, OFF.max_running, phase).executor
    phase.done()
    text = text_of(checkpoint)
    for task, prompt in TASKS.items():
        ids = await text.encode(prompt)
        for count in args.concurrent:
            await compare(executor, task, ids, args, count)
    await executor.close()
    text.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    clock.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
