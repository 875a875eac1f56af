"""Published claims that are asked again: one module per system, `claim` for what one is, `told` for how it reads."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.sim.claims import (
    batchllm,
    distserve,
    due_dates,
    fair_share,
    fastswitch,
    flexllm,
    hexgen,
    layered,
    nanoflow,
    nexus,
    orca,
    paging,
    past_future,
    reasoning,
    sarathi,
    semi_pd,
    splitfuse,
    tokenweave,
)
from headrace.sim.claims.claim import Claim, Missing

_MODULES = (
    orca,
    paging,
    sarathi,
    splitfuse,
    distserve,
    past_future,
    fair_share,
    batchllm,
    due_dates,
    flexllm,
    hexgen,
    layered,
    nanoflow,
    tokenweave,
    fastswitch,
    reasoning,
    semi_pd,
    nexus,
)
CLAIMS: Mapping[str, Claim] = {claim.name: claim for module in _MODULES for claim in module.CLAIMS}

NOT_YET = (
    Missing(
        "semi-PD",
        "1.62 times the rate of DistServe at 90 % of the SLO on Llama-3-8B.",
        "Roles of replicas. `semi-pd-goodput` judges it against systems on one device.",
    ),
    Missing(
        "Sarathi-Serve",
        "Falcon-180B on 8 A100 (tensor 4, pipeline 2, 100 GbE): 5.6 times the load of vLLM.",
        "Several micro-batches in flight between stages: the gain is mostly that of even ones.",
    ),
    Missing(
        "DistServe",
        "Tensor 2 for prefill and 1 for decode is best for OPT-13B at 200/100 ms: 1.56 requests a second and device.",
        "Roles of replicas, and the hand-over of KV between them.",
    ),
    Missing(
        "HexGen-Flow",
        "1.41 times shorter deadlines and 1.65 times the throughput of vLLM on unlike devices.",
        "Replicas of different devices in one simulation, and its workload: the traces carry no licence. "
        "`hexgen-urgency` judges the queue alone.",
    ),
    Missing(
        "Llumnix",
        "P99 prefill latency up to 15 times shorter, 36 % cheaper at equal P99, 20 to 30 ms of downtime a migration.",
        "Migration between replicas.",
    ),
    Missing(
        "Vidur",
        "Within 9 % of measured latency.",
        "Somebody who measures: its kernels' profiles are those of Sarathi-Serve, and this machine has no such device.",
    ),
    Missing(
        "NanoFlow, TokenWeave, T3",
        "What interference leaves of an overlap.",
        "Measured pairs of kernels that share a device; rooflines overlap for free.",
    ),
)
