"""Reads a `ModelShape` from any Hugging Face config.json: dense, mixtures, latent attention, sliding windows, nested.

Decides by fields, not by model names, wherever fields say enough. The mapping is untrusted: every number is bounded,
and what a decoder-only shape cannot express is refused with a sentence. Opens no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.core.shape import Latent, ModelShape
from headrace.core.types import HeadraceError

LARGEST = 10**9  # of any number in a config; the largest real ones are context lengths of some 10^7
MOST_LAYERS = 10_000

NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads"),
    "head_dim": ("head_dim", "d_kv", "kv_channels"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "per_token": ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn_hidden_size"),
}
NESTS = ("text_config", "llm_config", "language_config", "thinker_config")
UNGATED = frozenset(
    "bloom codegen falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj mpt opt persimmon phi starcoder2".split()
)
TIED = frozenset("bloom cohere cohere2 gemma gemma2 gemma3 gemma3_text gpt2 gpt_bigcode gpt_neo mpt opt".split())
RECURRENT = ("linear_attention", "mamba", "recurrent", "rwkv", "conv", "lightning")


class UnreadableConfig(HeadraceError):
    """A config.json that says too little, or describes something that is not a decoder-only transformer."""


class _Fields:
    """A config with its aliases. Numbers are checked as they are read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.kind = str(config.get("model_type", ""))

    def find(self, name: str, default: int | None = None) -> int:
        for alias in NAMES.get(name, (name,)):
            if self.config.get(alias) is not None:
                return self.whole(alias)
        if default is None:
            aliases = " or ".join(NAMES.get(name, (name,)))
            raise UnreadableConfig(f"The config has no {aliases}; is it the config.json of a language model?")
        return default

    def whole(self, key: str, default: int = 0) -> int:
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
            raise UnreadableConfig(f"{key} is {str(value)[:40]!r}; it should be a whole number up to {LARGEST}.")
        return value


def from_hf(config: Mapping[str, Any]) -> ModelShape:
    """The shape a config.json describes. Raises UnreadableConfig with the missing or impossible field."""
    fields = _Fields(_flat(config))
    _refuse(fields)
    layers, hidden, heads = fields.find("layers"), fields.find("hidden"), fields.find("heads")
    if not (layers and hidden and heads) or layers > MOST_LAYERS:
        raise UnreadableConfig(f"{layers} layers, {hidden} hidden and {heads} heads cannot be a transformer.")
    latent = _latent(fields)
    shape = ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if latent else _kv_heads(fields, heads),
        head_dim=_head_dim(fields, hidden, heads, latent),
        vocab=fields.find("vocab"),
        max_context_tokens=fields.find("context", 2048),
        tied_embedding=bool(fields.config.get("tie_word_embeddings", fields.kind in TIED)),
        windows=_windows(fields, layers),
        gated=_gated(fields),
        latent=latent,
        **_feed_forward(fields, layers, hidden),
    )
    if heads % shape.kv_heads:
        raise UnreadableConfig(f"{heads} query heads cannot share {shape.kv_heads} key heads evenly.")
    return shape


def _flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's own fields: nested text configs (two levels at most) and DBRX's two halves win."""
    merged = dict(config)
    for _ in range(2):
        for nest in NESTS:
            inner = merged.pop(nest, None)
            if isinstance(inner, Mapping):
                merged |= inner
    for half in ("attn_config", "ffn_config"):
        inner = merged.get(half)
        if isinstance(inner, Mapping):
            merged |= {key: value for key, value in inner.items() if key != "model_type"}
    return merged


def _refuse(fields: _Fields) -> None:
    config = fields.config
    if config.get("is_encoder_decoder"):
        raise UnreadableConfig("The config describes an encoder-decoder; only decoders are modelled.")
    types = config.get("layer_types") or config.get("layers_block_type") or ()
    kinds = {str(kind) for kind in types} if isinstance(types, (list, tuple)) else set[str]()
    strange = sorted(kind for kind in {*kinds, fields.kind} if any(word in kind for word in RECURRENT))
    if strange or "full_attn_idxs" in config or "mamba_d_state" in config:
        raise UnreadableConfig(
            f"Layers that keep a state instead of KV ({', '.join(strange) or 'mamba'}) are not modelled."
        )


def _kv_heads(fields: _Fields, heads: int) -> int:
    """Falcon's flags come first: `num_kv_heads` counts only in its newer architecture."""
    config = fields.config
    if fields.kind in ("falcon", "gpt_bigcode") and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    if config.get("multi_query_attention") is False:
        return heads
    return fields.find("kv_heads", heads) or heads


def _head_dim(fields: _Fields, hidden: int, heads: int, latent: Latent | None) -> int:
    if latent:
        return fields.whole("qk_nope_head_dim") + latent.rope_dim
    given = fields.find("head_dim", 0)
    if not given and hidden % heads:
        raise UnreadableConfig(f"{hidden} hidden elements do not divide into {heads} heads, and head_dim is missing.")
    return given or hidden // heads


def _latent(fields: _Fields) -> Latent | None:
    if not fields.whole("kv_lora_rank"):
        return None
    return Latent(
        kv_rank=fields.whole("kv_lora_rank"),
        rope_dim=fields.find("qk_rope_head_dim"),
        value_dim=fields.find("v_head_dim"),
        q_rank=fields.whole("q_lora_rank"),
    )


def _gated(fields: _Fields) -> bool:
    activation = str(fields.config.get("feed_forward_proj", fields.config.get("mlp_type", "")))
    return fields.kind not in UNGATED or activation.startswith("gated")


def _feed_forward(fields: _Fields, layers: int, hidden: int) -> dict[str, int]:
    experts = fields.find("experts", 0)
    if experts <= 1:
        return {"ffn": fields.find("ffn", 4 * hidden)}
    width = fields.find("expert_ffn", 0) or fields.find("ffn")
    dense = _dense_layers(fields, layers)
    wide = fields.whole("intermediate_size_mlp") or fields.find("ffn", 0)
    mixture = {"ffn": width, "experts": experts, "experts_per_token": fields.find("per_token")}
    if not 0 < mixture["experts_per_token"] <= experts:
        raise UnreadableConfig(f"{mixture['experts_per_token']} experts a token of {experts} cannot be.")
    return mixture | {
        "shared_experts": _shared_experts(fields, width),
        "dense_layers": dense,
        "dense_ffn": wide if dense else 0,
    }


def _shared_experts(fields: _Fields, width: int) -> int:
    """As many experts of the routed size as the shared ones weigh."""
    wide = fields.whole("shared_expert_intermediate_size") or fields.whole("shared_intermediate_size")
    if wide:
        return round(wide / width)
    if fields.kind.startswith("llama4"):
        return 1
    return fields.whole("n_shared_experts") or fields.whole("num_shared_experts")


def _dense_layers(fields: _Fields, layers: int) -> int:
    """Layers without experts, by any of the ways configs say so."""
    config = fields.config
    listed = config.get("moe_layers")
    if isinstance(listed, (list, tuple)) and listed:
        return layers - min(layers, len(listed))
    first = min(layers, fields.whole("first_k_dense_replace"))
    every = fields.whole("interleave_moe_layer_step") or fields.whole("moe_layer_freq") or 1
    if not fields.whole("moe_layer_freq"):
        every = fields.whole("decoder_sparse_step") or every
    only = config.get("mlp_only_layers")
    skipped = len(only) if isinstance(only, (list, tuple)) else 0
    return min(layers, first + (layers - first) - (layers - first) // every + skipped)


def windows(layers: int, window: int | None, global_every: int) -> tuple[int | None, ...]:
    """One window a layer; every `global_every`-th layer, counted from 1, sees everything. 0: none does."""
    if not window:
        return ()
    return tuple(None if global_every and (i + 1) % global_every == 0 else window for i in range(layers))


def _windows(fields: _Fields, layers: int) -> tuple[int | None, ...]:
    config = fields.config
    window = fields.whole("sliding_window") or fields.whole("attention_chunk_size")
    if not window or config.get("use_sliding_window") is False:
        return ()
    types = config.get("layer_types")
    if isinstance(types, (list, tuple)) and len(types) == layers:
        return tuple(None if kind == "full_attention" else window for kind in types)
    if config.get("use_sliding_window") is True and fields.whole("max_window_layers"):
        full = min(layers, fields.whole("max_window_layers"))
        return (None,) * full + (window,) * (layers - full)
    pattern = {"gemma2": 2, "gpt_oss": 2, "gemma3": 6, "gemma3_text": 6, "llama4": 4, "llama4_text": 4}
    every = fields.whole("sliding_window_pattern") or pattern.get(fields.kind, 0)
    return windows(layers, window, every)
