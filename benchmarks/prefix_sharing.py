"""32 requests that share a 1,024-token prefix, with and without the prefix cache: wall time and ratio.

Each round uses fresh prompts (another seed), all 32 are sent at once to a server that has never seen them.

    python benchmarks/prefix_sharing.py [--rounds 3]
"""

from __future__ import annotations

import argparse
from statistics import median

from server import bench, serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(args.rounds):
        for name, flag in (("with", "--prefix-cache"), ("without", "--no-prefix-cache")):
            with serving("smollm2", flag) as (url, _):
                run = bench(
                    url, "--rate", "inf", "--requests", "32", "--input", "1056", "--shared-prefix", "1024",
                    "--output", "32", "--seed", str(number),
                )  # fmt: skip
            assert run["failed"] == 0, run["failures"]
            seconds[name].append(run["duration"])
            print(f"round {number}, {name} the cache: {run['duration']:.2f} s, {run['cached_tokens']} tokens cached")
    fast, slow = median(seconds["with"]), median(seconds["without"])
    print(f"median of {args.rounds}: {fast:.2f} s with, {slow:.2f} s without the prefix cache, ratio {slow / fast:.1f}")


if __name__ == "__main__":
    main()
