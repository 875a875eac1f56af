"""What a simulation is told on the command line, in the environment or in a config file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrace.cluster.router import ROUTES
from headrace.core.config import BadSetting, setting

FORMATS = ("bf16", "fp32", "fp8", "int8", "int4")


@dataclass(frozen=True, slots=True)
class SimulateSettings:
    """What the traffic meets."""

    model: str = setting("llama-3.1-8b", "a name of the catalogue (--list models), or a config.json of Hugging Face")
    hardware: str = setting(
        "H100-SXM", "devices of one replica (--list devices): NAME, 4xNAME, or 2x8xNAME@LINK for two nodes of eight"
    )
    replicas: int = setting(1, "how many of these")
    dispatch: str = setting("round-robin", "which replica a request goes to", tuple(ROUTES))
    tensor: int | None = setting(None, "devices that share every layer; by default all of a stage")
    pipeline: int = setting(1, "stages, each with its share of the layers")
    microbatches: int = setting(1, "parts of a step that follow each other through the stages")
    attention_copies: int = setting(1, "copies of the attention within a stage, each for its own requests")
    spread_experts: bool = setting(False, "experts lie whole on one device each, instead of in slices on all")
    weights: str = setting("bf16", "format of the weights; fp8 and int8 multiply in 8 bits", FORMATS)
    kv: str = setting("bf16", "format of keys and values", FORMATS)
    memory_use: float = setting(0.9, "share of a device's memory for weights and KV")
    compute_share: float | None = setting(None, "share of the peak FLOP/s that kernels reach, if not the convention's")
    bandwidth_share: float | None = setting(None, "share of the memory bandwidth, likewise")
    network_share: float | None = setting(None, "share of the links' bandwidth that collectives reach, likewise")
    host_ms: float = setting(0.5, "what the host adds to every step")
    convention: str = setting(
        "headrace", "what is counted, and how; see docs/simulator.md", ("headrace", "ideal", "genz", "llm-viewer")
    )
    calibration: Path | None = setting(None, "price steps by this file of `headrace calibrate`, and not by catalogue")
    strict: bool = setting(False, "refuse steps beyond what was calibrated, instead of marking them in the report")
    attain: float = setting(0.99, "share of the requests that must keep every promise of --slo; 0.99 is their p99")
    draft_acceptance: str = setting(
        "0.7", "chance that a draft of --speculate is right: 0.7, by place in the step 0.8,0.6, by request 0.2:0.9"
    )
    follow_steps: bool = setting(
        False, "the token budget follows what steps take, as that of `serve`; by default it is derived once"
    )
    fast_forward: bool = setting(True, "many decode steps at once, with the same results")

    def __post_init__(self) -> None:
        bounds = {
            "replicas": (1, 10_000),
            "pipeline": (1, 1024),
            "microbatches": (1, 1024),
            "tensor": (1, 1024),
            "attention_copies": (1, 1024),
            "memory_use": (0.01, 1.0),
            "compute_share": (0.001, 1.0),
            "bandwidth_share": (0.001, 1.0),
            "network_share": (0.001, 1.0),
            "host_ms": (0.0, 10_000.0),
            "attain": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails too
                raise BadSetting(f"--{name.replace('_', '-')} is {value}; it must be between {low:g} and {high:g}")
