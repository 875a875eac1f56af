"""Gives a GGUF file's names their Hugging Face meaning: config.json terms, tensor names, the order of q and k rows.

Owns nothing. Metadata numbers are range-checked here, because they become loop counts and shapes; whether the tensors
have the shapes that the config implies is for the model to check when it takes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.device.gguf import GGUFFile
from headrace.device.modelfile import BadModelFile

# GGUF architecture -> (Hugging Face class, model type). Mistral files call themselves llama.
ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA_BLOCK = _BLOCK | {  # a norm before and after each half of the layer
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_GEMMA_LOCAL_THETA = 10_000.0  # not in the file: the same for all of Gemma 3
_GEMMA_PATTERN = 6  # every sixth layer attends to everything
_GEMMA_27B_LAYERS = 62  # the one size whose query scale is not that of its head


class Metadata:
    """Typed, bounded access to a GGUF file's metadata. `{arch}` in a key is the architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self._pairs = file.metadata
        self._where = file.path
        self.arch = self.text("general.architecture") or ""

    def _get(self, key: str) -> Any:
        return self._pairs.get(key.replace("{arch}", self.arch) if "{arch}" in key else key)

    def _bad(self, key: str, value: Any) -> BadModelFile:
        return BadModelFile(f"{self._where}: the metadata {key.replace('{arch}', self.arch)} is {value!r:.60}")

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise self._bad(key, value)
        return value

    def flag(self, key: str) -> bool | None:
        value = self._get(key)
        if value is not None and not isinstance(value, bool):
            raise self._bad(key, value)
        return value

    def count(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        """A positive number. A list, one number per layer, counts when all its numbers are equal."""
        value = self._get(key)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise self._bad(key, "missing" if value is None else value)
        return value

    def number(self, key: str, default: float) -> float:
        """A positive finite float."""
        value = self._get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._bad(key, value)
        return float(value)

    def token_id(self, key: str, vocab: int) -> int | None:
        """A token id, or None if there is none; ids outside the vocabulary mean none, as writers use -1 for that."""
        value = self._get(key)
        if value is not None and type(value) is not int:
            raise self._bad(key, value)
        return value if value is not None and 0 <= value < vocab else None

    def items(self, key: str, kind: type | tuple[type, ...]) -> tuple[Any, ...] | None:
        """An array all of whose elements are of one type."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
            raise self._bad(key, value)
        return value


def config_of(file: GGUFFile, meta: Metadata) -> dict[str, Any]:
    """The metadata in the terms of a Hugging Face config.json. Raises BadModelFile for what it cannot express."""
    if meta.arch not in ARCHITECTURES:
        raise BadModelFile(
            f"{file.path} has the architecture {meta.arch!r:.40}; supported are {', '.join(ARCHITECTURES)}"
        )
    _refuse_unsupported(file, meta)
    heads, hidden = meta.count("{arch}.attention.head_count", most=1 << 12), meta.count("{arch}.embedding_length")
    head_dim = meta.count("{arch}.attention.key_length", max(1, hidden // heads), most=1 << 12)
    name, model_type = ARCHITECTURES[meta.arch]
    config = {
        "architectures": [name],
        "model_type": model_type,
        "num_hidden_layers": meta.count("{arch}.block_count", most=1 << 12),
        "hidden_size": hidden,
        "intermediate_size": meta.count("{arch}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count("{arch}.attention.head_count_kv", heads, most=1 << 12),
        "head_dim": head_dim,
        "vocab_size": _vocab(file),
        "max_position_embeddings": meta.count("{arch}.context_length", most=1 << 40),
        "rms_norm_eps": meta.number("{arch}.attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": meta.number("{arch}.rope.freq_base", 1_000_000.0 if meta.arch == "gemma3" else 10_000.0),
        "rope_scaling": _rope_scaling(file, meta, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "torch_dtype": "float32",
    }
    if meta.arch == "gemma3":
        return config | _gemma_config(meta, config)
    return config | _window_config(meta)


def tensor_names(file: GGUFFile, arch: str) -> dict[str, str]:
    """Hugging Face name -> name in the file, for every tensor that has one."""
    block = _GEMMA_BLOCK if arch == "gemma3" else _BLOCK
    names: dict[str, str] = {}
    for stored in file.tensors:
        stem, _, kind = stored.rpartition(".")
        if stem in _OUTER:
            names[f"{_OUTER[stem]}.{kind}"] = stored
        elif stem.startswith("blk."):
            layer, _, part = stem.removeprefix("blk.").partition(".")
            if layer.isascii() and layer.isdigit() and part in block:
                names[f"model.layers.{int(layer)}.{block[part]}.{kind}"] = stored
    return names


def has_interleaved_rows(arch: str, stored: str) -> bool:
    """Llama files store rows of q and k in the order of interleaved rotary embedding; the others do not."""
    return arch == "llama" and (".attn_q." in stored or ".attn_k." in stored)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k so that rotating halves does what rotating neighbours did.

    within a head of 6:  stored 0 3 1 4 2 5  ->  0 1 2 3 4 5      rows: [heads * head_dim, ...]
    """
    if rows.shape[0] % (2 * heads):
        raise BadModelFile(f"a projection of {rows.shape[0]} rows cannot have {heads} heads of even size")
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _vocab(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadModelFile(f"{file.path} has no embedding matrix token_embd.weight; it is not a whole language model")
    return embedding.shape[0]


def _refuse_unsupported(file: GGUFFile, meta: Metadata) -> None:
    if meta.count("split.count", 1) > 1:
        raise BadModelFile(f"{file.path} is one part of a split model; merge the parts into one file first")
    if any("_exps." in name for name in file.tensors):
        raise BadModelFile(f"{file.path} is a mixture of experts, which is not supported from GGUF")


def _rope_scaling(file: GGUFFile, meta: Metadata, head_dim: int) -> dict[str, Any] | None:
    """How positions are scaled, as a config says it; `{"rope_type": "factors", "factors": [...]}` is our addition."""
    if meta.count("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise BadModelFile(f"{file.path} rotates only part of each head, which is not supported")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_type": "factors", "factors": _divisors(file, head_dim // 2)}
    kind = meta.text("{arch}.rope.scaling.type") or "none"
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise BadModelFile(f"{file.path} scales positions by {kind!r:.40}; supported are linear and yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": meta.number("{arch}.rope.scaling.factor", 1.0)}
    if kind == "yarn":
        default = meta.count("{arch}.context_length", most=1 << 40)
        scaling["original_max_position_embeddings"] = meta.count(
            "{arch}.rope.scaling.original_context_length", default, most=1 << 40
        )
    return scaling


def _divisors(file: GGUFFile, pairs: int) -> list[float]:
    """What each frequency is divided by: Llama 3 files carry this instead of the parameters it was computed from."""
    info = file.tensors["rope_freqs.weight"]
    if info.shape != (pairs,):
        raise BadModelFile(f"{file.path}: rope_freqs.weight has the shape {info.shape}, not ({pairs},)")
    divisors: list[float] = file.load(info.name).tolist()
    if not all(0 < divisor < math.inf for divisor in divisors):
        raise BadModelFile(f"{file.path}: rope_freqs.weight holds a number that nothing can be divided by")
    return divisors


def _window_config(meta: Metadata) -> dict[str, Any]:
    """A sliding window in a llama file makes it a Mistral."""
    window = meta.count("{arch}.attention.sliding_window", default=1 << 40, most=1 << 40)
    if window == 1 << 40:
        return {"sliding_window": None}
    if meta.arch == "llama":
        return {"sliding_window": window, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}


def _gemma_config(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    per_head = config["hidden_size"] // heads if layers == _GEMMA_27B_LAYERS else config["head_dim"]
    pattern = meta.count("{arch}.attention.sliding_window_pattern", _GEMMA_PATTERN)
    kinds = ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": meta.count("{arch}.attention.sliding_window"),
        "layer_types": kinds,
        "rope_local_base_freq": meta.number("{arch}.rope.freq_base_swa", _GEMMA_LOCAL_THETA),
        "query_pre_attn_scalar": per_head,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "headrace_norm_includes_one": True,
    }
