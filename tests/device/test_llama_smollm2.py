"""The embedded default model, dequantised, against transformers reading the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from headrace.device.checkpoint import Checkpoint, open_checkpoint
from headrace.device.llama import Llama, LlamaConfig

PROMPTS = (
    "A headrace is the channel that",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Der Müller öffnet das Wehr, und das Wasser schießt durch den Graben. " * 12,
)


@pytest.fixture(scope="module")
def checkpoint(smollm2_path: Path) -> Checkpoint:
    return open_checkpoint(smollm2_path)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def theirs(path: Path) -> Any:
    """The model as transformers reads it from GGUF, by its own mapping of names and order of rows.

    `from_pretrained` would do, but needs one more package to do it.
    """
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    model.tie_weights()
    return model


@torch.inference_mode()
def test_logits_equal_transformers(checkpoint: Checkpoint, smollm2_path: Path) -> None:
    model = theirs(smollm2_path)
    config = LlamaConfig.from_hf(checkpoint.config)
    llama = Llama(
        config,
        checkpoint.tensor,
        lambda weight, bias: lambda x: functional.linear(x, weight, bias),
        torch.float32,
        torch.device("cpu"),
    )
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    assert config.shape.tied_embedding
    for prompt in PROMPTS:
        ids = torch.tensor(tokenizer.encode(prompt).ids)
        expected = model(ids[None]).logits[0]
        x = llama.layers(llama.embed(ids), 0, config.shape.layers, torch.arange(len(ids)), causal)
        assert (llama.logits(x) - expected).abs().max() <= 1e-4, prompt
