"""Configs as they are published, old and new, and configs that must be refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.types import HeadraceError
from headrace.device.architecture import SUPPORTED, LlamaConfig
from headrace.device.rope import Rope

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 131, "hidden_size": 48,
    "intermediate_size": 76, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
}  # fmt: skip
SIZES = {key: LLAMA[key] for key in list(LLAMA)[2:-2]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", {"sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen2, no window": ("Qwen2Config", {"max_window_layers": 3}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "smollm3": ("SmolLM3Config", {}),
    "smollm3, windows": ("SmolLM3Config", {"use_sliding_window": True, "sliding_window": 9}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 9}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_left_out_mean_what_transformers_takes_them_to_mean(name: str) -> None:
    family, extra = FAMILIES[name]
    full = getattr(transformers, family)(**SIZES | extra).to_dict()
    config = SIZES | extra | {"model_type": full["model_type"]}
    if family == "Qwen3Config":
        config["head_dim"] = full["head_dim"]  # its default, 128, is not that of the other families
    assert LlamaConfig.from_hf(config) == LlamaConfig.from_hf(full)


def test_old_and_new_ways_to_write_rope_are_equal() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = LLAMA | {"rope_scaling": {"type": "llama3"} | scaling}
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new |= {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | scaling}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
    assert LlamaConfig.from_hf(old).ropes == (Rope(8, 5e5, 32, "llama3", 8.0),) * 8


def test_gemma3_as_published() -> None:
    """The text part inside the multimodal config names few fields; the rest are defaults of the type."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    gemma = LlamaConfig.from_hf(config)
    assert (gemma.shape.heads, gemma.shape.kv_heads, gemma.shape.head_dim) == (8, 4, 256)
    assert (gemma.shape.vocab, gemma.shape.max_context_tokens, gemma.shape.tied_embedding) == (262_208, 131_072, True)
    assert gemma.shape.windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)
    assert gemma.ropes[0] == Rope(256, 1e4, 131_072)
    assert gemma.ropes[5] == Rope(256, 1e6, 131_072, "linear", 8.0)
    assert gemma == LlamaConfig.from_hf(transformers.Gemma3TextConfig(**text).to_dict())


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        ({}, 128),
        ({"type": "linear", "factor": 4.0}, 128),
        ({"type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_context(scaling: dict[str, Any], tokens: int) -> None:
    assert LlamaConfig.from_hf(LLAMA | {"rope_scaling": scaling}).shape.max_context_tokens == tokens


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba"}, "mamba.*supported: gemma3_text, llama, mistral"),
        ({"model_type": None}, "not supported"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        ({"hidden_act": "relu"}, "relu.*silu"),
        ({"hidden_act": ["silu"]}, "not supported"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 50}, "multiple of num_attention_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "divisor"),
        ({"head_dim": 7}, "even head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope.*supported: default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}, "below"),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, "factor"),
        ({"rope_scaling": {"type": "factors", "factors": [1.0, 2.0]}}, "list of 4"),
        ({"rope_scaling": {"type": "factors", "factors": [1.0, 2.0, 0.0, 1.0]}}, "factors"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ({"model_type": "mixtral"}, "num_local_experts"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mix dense layers"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, "rope_parameters"),
    ],
)
def test_refusals_say_what_is_wrong(change: dict[str, Any], says: str) -> None:
    with pytest.raises(HeadraceError, match=says):
        LlamaConfig.from_hf(LLAMA | change)


def test_the_list_of_what_is_supported_is_true() -> None:
    text = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    for kind in SUPPORTED:
        assert LlamaConfig.from_hf(
            {"model_type": kind.split()[0], "text_config": text | {"model_type": "gemma3_text"}} | text
        )


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), inner),
    max_leaves=4,
)
KEYS = [*LLAMA, "head_dim", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window",
        "max_window_layers", "num_experts", "num_experts_per_tok", "no_rope_layers", "tie_word_embeddings",
        "sliding_window_pattern", "text_config", "mlp_only_layers", "attn_logit_softcapping"]  # fmt: skip


@given(st.sampled_from([kind.split()[0] for kind in SUPPORTED]), st.dictionaries(st.sampled_from(KEYS), anything))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_no_config_does_more_than_be_refused(kind: str, changes: dict[str, Any]) -> None:
    try:
        config = LlamaConfig.from_hf(LLAMA | {"model_type": kind} | changes)
    except HeadraceError as error:
        assert len(str(error)) < 400
    else:
        assert len(config.ropes) == config.shape.layers
        assert json.dumps(config.shape.max_context_tokens)
