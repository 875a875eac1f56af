"""Who computes with native kernels never waits for torch, nor holds its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.device.native import library

# a model loads, is measured, and draws tokens, some of them with penalties, log-probabilities and filters
STEPS = """
import sys
sys.modules["torch"] = None  # whoever imports it fails
from pathlib import Path
import headrace.cli.worker
from headrace.core.config import DeviceSettings
from headrace.core.step import Admitted, StepPlan, Work
from headrace.core.types import Request, Sampling, Tokens
from headrace.device.checkpoint import open_checkpoint
from headrace.device.encoder import open_encoder
from headrace.device.load import expect, load
headrace.cli.worker.preload()
path = Path(sys.argv[1])
checkpoint, settings = open_checkpoint(path), DeviceSettings(kernels="native", max_context=256, kv_memory=64 << 20)
assert expect(checkpoint, settings, 16, 4, 512).weights > 0
assert open_encoder(path, "reads")[0].nbytes > 0
loaded = load(checkpoint, settings, 16, 4, host_bytes=8 << 20)
drawing = Sampling(seed=1, logprobs=2, top_p=0.9, repetition_penalty=1.1, logit_bias=((7, 1.0),), prompt_logprobs=1)
samplings = enumerate((Sampling(temperature=0), drawing))
requests = [Request(str(at), (Tokens((1, 2, 3)),), 0.0, 4, one) for at, one in samplings]
admitted = tuple(Admitted(one, (), (at,), 0) for at, one in enumerate(requests))
plan = StepPlan(0, tuple(Work(one.id, 0, 3, True) for one in requests), admitted)
result = loaded.executor.step(plan)
assert len(result.sampled["1"].logprobs[0].top) == 2 and len(result.prompt_logprobs["1"]) == 2
print(loaded.kernels)
"""


def test_a_model_in_native_kernels_needs_no_torch(smollm2_path: Path) -> None:
    if library.variant() in (None, "portable"):
        pytest.skip("torch is the default here")
    command = [sys.executable, "-c", STEPS, str(smollm2_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("native")


def test_listing_models_needs_no_torch() -> None:
    words = "import sys; sys.modules['torch'] = None; from headrace.cli import main; sys.exit(main(['models']))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
