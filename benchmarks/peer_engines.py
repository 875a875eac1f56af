"""One engine in a process and an environment of its own, driven by lines of JSON. benchmarks/peers.py starts it.

    asked    {"prompts": [[token ids], ...], "output": n}    all at once; every one gets n tokens, whatever they are
    answers  {"first_s": ..., "wall_s": ..., "tokens": ...}  until the first token of the first answer, until the last
                                                             of all; how many

    PYTHON benchmarks/peer_engines.py {headrace,openvino,vllm} MODEL [--threads N] [flags of Headrace]

Imports nothing before it knows the engine: every environment has its own only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from itertools import count
from typing import Any, Protocol

Times = tuple[float, float, int]  # seconds to the first token, to the last one; tokens


class Engine(Protocol):
    def run(self, prompts: list[list[int]], output: int) -> Times: ...


class Headrace:
    """The engine that `headrace serve` puts behind its API, without the API."""

    def __init__(self, model: str, threads: int, flags: list[str]) -> None:
        from headrace.cli.assemble import Phases, add_model, assemble

        parser = argparse.ArgumentParser()
        add_model(parser)
        self._assembled = assemble(parser.parse_args([model, "--threads", str(threads), *flags]), {}, Phases())
        self._numbers = count()
        self._runner = asyncio.Runner()
        self._serving: asyncio.Task[None] | None = None

    def run(self, prompts: list[list[int]], output: int) -> Times:
        return self._runner.run(self._run(prompts, output))

    async def _run(self, prompts: list[list[int]], output: int) -> Times:
        if self._serving is None:
            self._serving = asyncio.create_task(self._assembled.engine.run())
        begin = time.perf_counter()
        answers = await asyncio.gather(*(self._one(tuple(prompt), output) for prompt in prompts))
        return answers[0][0] - begin, time.perf_counter() - begin, sum(tokens for _, tokens in answers)

    async def _one(self, ids: tuple[int, ...], output: int) -> tuple[float, int]:
        """When the first token came, and how many did."""
        from headrace.core import clock
        from headrace.core.keys import block_keys
        from headrace.core.types import Request, Sampling, Tokens

        keys = block_keys(ids, self._assembled.engine.capacity.block_tokens, b"")
        sampling = Sampling(temperature=0.0)
        name = f"peer {next(self._numbers)}"
        request = Request(name, (Tokens(ids),), clock.now(), output, sampling, block_keys=keys)
        first, tokens = 0.0, 0
        async for answer in self._assembled.engine.generate(request):
            assert answer.error is None, answer.error
            first = first or time.perf_counter()
            tokens += len(answer.token_ids)
        return first, tokens


class OpenVINO:
    """openvino-genai's pipeline with continuous batching and prefix caching. It reads the GGUF file itself."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino_genai as genai

        self._genai = genai
        plan = genai.SchedulerConfig()
        plan.max_num_batched_tokens, plan.max_num_seqs, plan.cache_size = 2048, 64, 2
        plan.dynamic_split_fuse, plan.enable_prefix_caching = True, True
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = genai.ContinuousBatchingPipeline(model, plan, "CPU", settings)
        self._numbers = count()

    def run(self, prompts: list[list[int]], output: int) -> Times:
        import numpy as np
        import openvino as ov

        asked = self._genai.GenerationConfig()
        asked.max_new_tokens, asked.min_new_tokens, asked.ignore_eos, asked.do_sample = output, output, True, False
        begin = time.perf_counter()
        handles = [
            self._pipeline.add_request(next(self._numbers), ov.Tensor(np.array([prompt], dtype=np.int64)), asked)
            for prompt in prompts
        ]
        first = 0.0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            if not first and handles[0].can_read():
                first = time.perf_counter() - begin
        wall = time.perf_counter() - begin
        return first, wall, sum(len(one.generated_ids) for handle in handles for one in handle.read_all())


class VLLM:
    """vLLM's engine on a CPU; `model` is a folder with safetensors, for it reads no GGUF of this kind."""

    def __init__(self, model: str) -> None:
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._engine = LLM(
            model, dtype="bfloat16", max_model_len=2048, max_num_seqs=64, skip_tokenizer_init=True
        ).llm_engine
        self._numbers = count()

    def run(self, prompts: list[list[int]], output: int) -> Times:
        asked = self._params(temperature=0, max_tokens=output, min_tokens=output, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        for prompt in prompts:
            self._engine.add_request(f"peer {next(self._numbers)}", {"prompt_token_ids": prompt}, asked)
        first, tokens = 0.0, 0
        while self._engine.has_unfinished_requests():
            for answer in self._engine.step():
                if not first and answer.outputs and answer.outputs[0].token_ids:
                    first = time.perf_counter() - begin
                tokens += len(answer.outputs[0].token_ids) if answer.finished else 0
        return first, time.perf_counter() - begin, tokens


def made(name: str, model: str, threads: int, flags: list[str]) -> Engine:
    if name == "headrace":
        return Headrace(model, threads, flags)
    return OpenVINO(model, threads) if name == "openvino" else VLLM(model)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("engine", choices=("headrace", "openvino", "vllm"))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args, flags = parser.parse_known_args()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever an engine prints must not be taken for an answer
        engine = made(args.engine, args.model, args.threads, flags)
        for line in sys.stdin:
            asked: dict[str, Any] = json.loads(line)
            first, wall, tokens = engine.run(asked["prompts"], asked["output"])
            answers.write(json.dumps({"first_s": first, "wall_s": wall, "tokens": tokens}) + "\n")
            answers.flush()
        os._exit(0)  # some engines take seconds to end, or never do


if __name__ == "__main__":
    main()
