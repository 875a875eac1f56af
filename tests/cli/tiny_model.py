"""A random model of a few thousand weights as a Hugging Face folder, for commands that load one."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import tokenizers
import torch

HIDDEN, FFN, HEADS, VOCAB, LAYERS, CONTEXT = 32, 48, 2, 200, 2, 512
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def write(folder: Path, tokenizer: tokenizers.Tokenizer | None = None, seed: int = 1, **config: object) -> Path:
    """With a tokenizer of one's own, or other entries of the config."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tokenizer or _tokenizer()
    vocab = tokenizer.get_vocab_size()
    rows = {"gate_proj": FFN, "up_proj": FFN, "embed_tokens": vocab}
    tensors = {}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    parts += ("mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    names = ["model.embed_tokens", "model.norm", *(f"model.layers.{n}.{part}" for n in range(LAYERS) for part in parts)]
    for name in names:
        part = name.split(".")[-1]
        shape = (HIDDEN,) if "norm" in part else (rows.get(part, HIDDEN), FFN if part == "down_proj" else HIDDEN)
        tensors[f"{name}.weight"] = 0.3 * torch.randn(shape, generator=generator) + ("norm" in part)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab} | config))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> tokenizers.Tokenizer:
    """One token for each byte of plain text, and some that stand for nothing."""
    plain = [chr(0x100 + ord(white)) for white in "\n "] + [chr(code) for code in range(33, 127)]
    words = {word: number for number, word in enumerate([*plain, *(f"w{n}" for n in range(len(plain), VOCAB))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
