"""Output tokens per second of `headrace serve` over HTTP against transformers' static batch, side by side.

The same weights (the dequantised GGUF), the same precision, threads and lengths; rounds alternate, medians are
compared. transformers has no server in between and gets its whole batch at once.

    python benchmarks/vs_transformers.py [--dtype fp32] [--rounds 3] [--batch 32] [--input 128] [--output 128]
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from server import bench, serving

from headrace.core import clock, config
from headrace.device import sources
from headrace.device.checkpoint import open_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_transformers(model: str, dtype: torch.dtype) -> Any:
    """The model in transformers, with exactly the weights that Headrace reads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(sources.resolve(model, config.home()))
    settings = {key: value for key, value in checkpoint.config.items() if not key.startswith("headrace_")}
    theirs = AutoConfig.for_model(settings.pop("model_type"), **settings)
    built = AutoModelForCausalLM.from_config(theirs, dtype=dtype)  # type: ignore[no-untyped-call]
    weights = {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.names()}
    missing, unexpected = built.load_state_dict(weights, strict=False)
    built.tie_weights()
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return built.eval()


def generate(model: Any, batch: int, prompt: int, output: int) -> float:
    """Output tokens per second of one static batch."""
    ids = torch.randint(1000, 30000, (batch, prompt))
    begin = clock.perf()
    with torch.inference_mode():
        done = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output,
            min_new_tokens=output,
            do_sample=False,
            pad_token_id=0,
        )
    assert done.shape[1] == prompt + output
    return batch * output / (clock.perf() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    args = parser.parse_args()
    theirs = load_transformers(args.model, DTYPES[args.dtype])
    rows: list[tuple[float, float]] = []
    with serving(args.model, "--dtype", args.dtype) as (url, _):
        for number in range(args.rounds):
            run = bench(
                url, "--concurrency", str(args.batch), "--requests", str(args.batch), "--seed", str(number),
                "--input", str(args.input), "--output", str(args.output),
            )  # fmt: skip
            assert run["failed"] == 0 and run["short_outputs"] == 0, run["failures"]
            rows.append((run["output_throughput"], generate(theirs, args.batch, args.input, args.output)))
            print(f"round {number}: headrace over HTTP {rows[-1][0]:.1f}, transformers {rows[-1][1]:.1f} tokens/s")
    ours, others = (median(row[at] for row in rows) for at in (0, 1))
    print(
        f"{args.dtype}, {args.batch} at once, {args.input} in / {args.output} out, median of {args.rounds}: headrace "
        f"{ours:.1f}, transformers {others:.1f} output tokens/s, ratio {ours / others:.2f}"
    )


if __name__ == "__main__":
    main()
