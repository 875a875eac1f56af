"""A tiny random model for live runs; the rest of the rig is that of the device tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "device"))

from rig import Model

HIDDEN, FFN, HEADS, VOCAB = 32, 48, 2, 200
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny() -> Model:
    generator = torch.Generator().manual_seed(1)
    made: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        if name not in made:
            part = name.split(".")[-2]
            rows = {"gate_proj": FFN, "up_proj": FFN, "embed_tokens": VOCAB}.get(part, HIDDEN)
            shape = (HIDDEN,) if "norm" in part else (rows, FFN if part == "down_proj" else HIDDEN)
            made[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
            if "norm" not in part:
                made[name] = torch.randn(shape, generator=generator) * (1.0 if part == "embed_tokens" else 0.3)
        return made[name]

    return Model(CONFIG, tensor)
