"""Step times of the native kernels by weight format and batch, beside torch's: decode at one context, and one prefill.

    python benchmarks/native_step.py [MODEL.gguf] [--threads 2] [--rounds 5] [--batches 1,8,32,64] [--context 256]
                                     [--prefill 1024] [--kinds torch,fp32,bf16,q8,file] [--kv bf16]

Every round measures every kind once, so that what drifts hits them all alike; medians are printed. `cpu` is processor
time per step of all threads: on a machine with other work it is what to compare.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.core import config
from headrace.core.shape import BF16, FP32, Q4, Q8
from headrace.device import sources
from headrace.device.checkpoint import Checkpoint, open_checkpoint
from headrace.device.forward import Rows
from headrace.device.native.forward import KV_KINDS, NativeForward, kv_store
from headrace.device.native.weights import Packer, pack
from headrace.device.reference.forward import TorchForward
from headrace.device.reference.linear import Linears
from headrace.device.reference.llama import Llama, LlamaConfig
from headrace.device.reference.tensorstore import TensorStore

AnyForward = NativeForward | TorchForward
BLOCK_TOKENS = 16
FORMATS = {"fp32": FP32, "bf16": BF16, "q8": Q8, "q4": Q4, "file": None}


def forward_of(checkpoint: Checkpoint, kind: str, kv: str, blocks: int, threads: int) -> AnyForward:
    model = LlamaConfig.from_hf(checkpoint.config)
    if kind == "torch":
        cpu = torch.device("cpu")
        linears = Linears(torch.float32, cpu)
        with torch.inference_mode():
            llama = Llama(model, checkpoint.tensor, linears.pack, torch.float32, cpu, linears.padded)
        return TorchForward(llama, linears, TensorStore(model.shape, blocks, BLOCK_TOKENS, torch.float32, cpu))
    packer = Packer(checkpoint.tensors, FORMATS[kind], threads)
    stored = next(each for each in KV_KINDS if each.name == ("fp32" if kind == "fp32" else kv))
    store = kv_store(model.shape, blocks, BLOCK_TOKENS, stored)
    return NativeForward(model, pack(model, packer), packer, store, stored, threads)


@torch.inference_mode()
def step(forward: AnyForward, spans: Sequence[Rows], ids: list[int]) -> tuple[float, float]:
    """Wall and processor seconds of one step with greedy tokens for the last row of every span."""
    begin, cpu = time.perf_counter(), time.process_time()
    hidden: Any = forward.layers(spans, 0, forward.shape.layers, ids, None)
    forward.logits(hidden, np.array([span.first_row + span.count - 1 for span in spans])).argmax(-1)
    return time.perf_counter() - begin, time.process_time() - cpu


def spans_of(count: int, start: int, tokens: int) -> list[Rows]:
    per = -(-(start + tokens) // BLOCK_TOKENS)
    return [Rows(n * tokens, start, tokens, np.arange(n * per, (n + 1) * per)) for n in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--kinds", default="torch,fp32,bf16,q8,file")
    parser.add_argument("--kv", default="bf16")
    args = parser.parse_args()
    batches, kinds = [int(each) for each in args.batches.split(",")], args.kinds.split(",")
    checkpoint = open_checkpoint(sources.resolve(args.model, Path(config.home())))
    blocks = max(max(batches) * (args.context // BLOCK_TOKENS + 1), args.prefill // BLOCK_TOKENS + 1)
    torch.set_num_threads(args.threads if kinds == ["torch"] else 1)
    forwards = {kind: forward_of(checkpoint, kind, args.kv, blocks, args.threads) for kind in kinds}
    works = {f"decode {n}": (n, spans_of(n, args.context, 1)) for n in batches}
    if args.prefill:
        works[f"prefill {args.prefill}"] = (args.prefill, spans_of(1, 0, args.prefill))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    shares: dict[tuple[str, str], str] = {}
    for round_ in range(args.rounds + 1):
        for work, (tokens, spans) in works.items():
            for kind, forward in forwards.items():
                torch.set_num_threads(args.threads if kind == "torch" else 1)
                seconds = step(forward, spans, [7 + n for n in range(tokens)])
                if round_:
                    found.setdefault((work, kind), []).append(seconds)
                if isinstance(forward, NativeForward):
                    times = forward.times()
                    parts = (times.linear, times.attention, times.head, times.other)
                    shares[work, kind] = " ".join(f"{100 * part / (sum(parts) or 1):3.0f}%" for part in parts)
    reference = kinds[0]
    print(
        f"{'step':14}{'weights':8}{'ms':>9}{'cpu ms':>9}{'tokens/s':>10}{'cpu ratio':>10}  linear attention head other"
    )
    for (work, kind), pairs in found.items():
        wall, cpu = (statistics.median([pair[which] for pair in pairs]) for which in (0, 1))
        base = statistics.median([each for _, each in found[work, reference]])
        rate, share = works[work][0] / wall, shares.get((work, kind), "")
        print(f"{work:14}{kind:8}{1000 * wall:9.2f}{1000 * cpu:9.2f}{rate:10.0f}{base / cpu:10.2f}  {share}")


if __name__ == "__main__":
    main()
