"""The half of `vidur_ratio.py` that runs in the interpreter that has vidur: it simulates the trace that it is given and
prints what that took, as one line of JSON.

Vidur fetches the profiles that its predictor is trained on, or the trained tables, from a hub. They are replaced by
tables of the same form from the linear price of a step, so nothing is downloaded or trained. All else is vidur's.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from typing import Any

LAYERS = 32  # of the model: vidur prices one layer, in milliseconds
GRAIN = 256  # of the KV sizes in vidur's tables
CHUNK_GRAIN = 32
WHOLE_STEP = "attn_pre_proj"  # the operator that carries what a step costs by its tokens alone
BY_TOKENS = (
    "attn_post_proj mlp_up_proj mlp_down_proj mlp_act attn_rope attn_kv_cache_save input_layernorm "
    "post_attention_layernorm add"
).split()


def tables(case: dict[str, Any]) -> dict[str, dict[tuple[int, ...], float]]:
    """Predictions by operator: milliseconds per layer."""
    share, most, rows = 1e3 / LAYERS, case["max_context_tokens"], range(1, case["max_running"] + 1)
    sizes = range(0, most + GRAIN + 1, GRAIN)
    chunks = range(CHUNK_GRAIN, case["token_budget"] + CHUNK_GRAIN, CHUNK_GRAIN)
    tokens = range(1, case["token_budget"] + case["max_running"] + 9)
    found: dict[str, dict[tuple[int, ...], float]] = {name: {(n,): 0.0 for n in tokens} for name in BY_TOKENS}
    found[WHOLE_STEP] = {(n,): share * (case["step_s"] + case["token_s"] * n) for n in tokens}
    found["attn_decode"] = {(n, size): share * case["context_s"] * n * size for n in rows for size in sizes}
    found["attn_prefill"] = {(size, n): share * case["reach_s"] * size * n for size in sizes for n in chunks}
    return found


def simulator(case: dict[str, Any], trace: str, output: str) -> Any:
    """Vidur's simulator of one replica, as near to ours as it can be set."""
    from vidur import config  # type: ignore[import-not-found]
    from vidur.execution_time_predictor.sklearn_execution_time_predictor import (  # type: ignore[import-not-found]
        SklearnExecutionTimePredictor,
    )
    from vidur.simulator import Simulator  # type: ignore[import-not-found]

    SklearnExecutionTimePredictor._load_predictions_from_hf = lambda _: tables(case)
    one_device = {"num_pipeline_stages": 1, "tensor_parallel_size": 1}
    settings = config.SimulationConfig(
        log_level="error",
        cluster_config=config.ClusterConfig(
            replica_config=config.ReplicaConfig(**one_device),
            cache_config=config.CacheConfig(block_size=case["block_tokens"], num_blocks=case["blocks"]),
            replica_scheduler_config=config.SarathiSchedulerConfig(
                batch_size_cap=case["max_running"], chunk_size=case["token_budget"]
            ),
        ),
        request_generator_config=config.TraceRequestGeneratorConfig(
            trace_file=trace,
            date="all",
            prefill_scale_factor=1,
            time_scale_factor=1,
            max_tokens=case["max_context_tokens"],
        ),
        execution_time_predictor_config=config.RandomForrestExecutionTimePredictorConfig(
            prediction_max_batch_size=case["max_running"],
            prediction_max_prefill_chunk_size=case["token_budget"],
            prediction_max_tokens_per_request=case["max_context_tokens"],
            kv_cache_prediction_granularity=GRAIN,
            attention_decode_batching_overhead_fraction=0.0,
            use_native_execution_time_predictor=case["native"],
            cache_dir=f"{output}/cache",
        ),
        metrics_config=config.MetricsConfig(
            write_metrics=case["metrics"], enable_chrome_trace=False, store_plots=False, output_dir=output
        ),
    )
    return Simulator(settings)


def cpu_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def main() -> None:
    case, trace = json.loads(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as output:
        simulation = simulator(case, trace, output)
        simulation._write_output = lambda: None  # files and plots, which the other side has none of
        requests = [event._request for _, event in simulation._event_queue]
        begun_s = cpu_s()
        simulation.run()
        end_s = cpu_s()
    spans = sorted(one.completed_at - one.arrived_at for one in requests)
    first = sorted(one.prefill_completed_at - one.arrived_at for one in requests)
    found = {"start_s": begun_s, "run_s": end_s - begun_s, "requests": len(requests)}
    found |= {"span_s": max(one.completed_at for one in requests), "e2e_s": sum(spans) / len(spans)}
    found |= {"ttft_s": sum(first) / len(first)}
    found |= {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
