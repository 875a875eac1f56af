from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.shape import KV_BF16, ModelShape
from headrace.core.types import HeadraceError
from headrace.sim.hardware import UnknownName
from headrace.sim.models import UnreadableConfig, from_hf, model, model_entry, model_names

# Published totals include norms, biases and learned positions, which shapes leave out: 0.2 % at the most, but for
# these, whose published number is itself rounded or whose positions weigh more.
COARSE = {"grok-1": 0.01, "glm-4.5": 0.01, "gpt-2": 0.01}


@pytest.mark.parametrize("name", model_names())
def test_a_shape_weighs_what_was_published(name: str) -> None:
    entry = model_entry(name)
    assert entry.shape.weights == pytest.approx(entry.published_weights, rel=COARSE.get(name, 0.002))
    assert entry.source and len(entry.shape.windows) in (0, entry.shape.layers)


@pytest.mark.parametrize("name", [name for name in model_names() if model_entry(name).published_active])
def test_a_mixture_wakes_what_was_published(name: str) -> None:
    """Publishers round to two digits, and some count the embedding table beside the output head."""
    entry, published = model_entry(name), model_entry(name).published_active
    active, table = entry.shape.active_weights, entry.shape.vocab * entry.shape.hidden
    assert any(value == pytest.approx(published, rel=0.04) for value in (active, active + table))


def test_the_catalogue_reaches_from_a_laptop_to_a_trillion() -> None:
    weights = [model(name).weights for name in model_names()]
    assert len(weights) >= 40 and min(weights) < 2e8 and max(weights) > 1e12
    assert sum(bool(model(name).experts) for name in model_names()) >= 10


def test_unknown_models_get_suggestions() -> None:
    assert model("Llama-3.1-70B") == model("llama-3.1-70b")
    with pytest.raises(UnknownName, match=r"llama-3\.1-70b"):
        model("llama3.1-70b")


def test_kv_bytes_a_token_match_the_published_ones() -> None:
    assert KV_BF16.bytes_per_token(model("smollm2-135m")) == 23_040
    assert KV_BF16.bytes_per_token(model("llama-3.1-70b")) == 327_680
    assert KV_BF16.bytes_per_token(model("deepseek-v3")) == 61 * 576 * 2  # the 70 KB of the DeepSeek-V3 report


def hf(**fields: Any) -> dict[str, Any]:
    return fields


LLAMA = hf(
    model_type="llama", num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama-3-8b": LLAMA,
    "mistral-7b": LLAMA
    | hf(model_type="mistral", vocab_size=32000, max_position_embeddings=32768, sliding_window=4096),
    "mixtral-8x7b": LLAMA
    | hf(
        model_type="mixtral", vocab_size=32000, max_position_embeddings=32768, sliding_window=None,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "smollm2-135m": hf(
        model_type="llama", num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "qwen2-57b-a14b": hf(
        model_type="qwen2_moe", num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, moe_intermediate_size=2560, shared_expert_intermediate_size=20480, num_experts=64,
        num_experts_per_tok=8, vocab_size=151936, max_position_embeddings=131072, decoder_sparse_step=1,
        use_sliding_window=False, sliding_window=65536, max_window_layers=28, tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": hf(
        model_type="qwen3_moe", num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, max_position_embeddings=40960, decoder_sparse_step=1, mlp_only_layers=[],
        tie_word_embeddings=False,
    ),
    "deepseek-v2-lite": hf(
        model_type="deepseek_v2", num_hidden_layers=27, hidden_size=2048, num_attention_heads=16,
        num_key_value_heads=16, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, moe_layer_freq=1, kv_lora_rank=512,
        q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, vocab_size=102400,
        max_position_embeddings=163840, tie_word_embeddings=False,
    ),
    "gemma-3-4b": hf(
        model_type="gemma3",
        text_config=hf(
            model_type="gemma3_text", num_hidden_layers=34, hidden_size=2560, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, intermediate_size=10240, vocab_size=262208, sliding_window=1024,
            max_position_embeddings=131072,
        ),
        vision_config=hf(hidden_size=1152, num_hidden_layers=27),
    ),
    "gemma-2-2b": hf(
        model_type="gemma2", num_hidden_layers=26, hidden_size=2304, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, intermediate_size=9216, vocab_size=256000, sliding_window=4096, max_position_embeddings=8192,
    ),
    "gpt-2": hf(model_type="gpt2", n_layer=12, n_embd=768, n_head=12, n_inner=None, n_positions=1024, vocab_size=50257),
    "opt-13b": hf(
        model_type="opt", num_hidden_layers=40, hidden_size=5120, num_attention_heads=40, ffn_dim=20480,
        vocab_size=50272, max_position_embeddings=2048, do_layer_norm_before=True,
    ),
    "falcon-7b": hf(
        model_type="falcon", num_hidden_layers=32, hidden_size=4544, num_attention_heads=71, num_kv_heads=71,
        multi_query=True, new_decoder_architecture=False, vocab_size=65024, tie_word_embeddings=False,
    ),
    "falcon-40b": hf(
        model_type="falcon", num_hidden_layers=60, hidden_size=8192, num_attention_heads=128, num_kv_heads=8,
        new_decoder_architecture=True, vocab_size=65024, tie_word_embeddings=False,
    ),
    "dbrx": hf(
        model_type="dbrx", n_layers=40, d_model=6144, n_heads=48, vocab_size=100352, max_seq_len=32768,
        attn_config=hf(model_type="", kv_n_heads=8, clip_qkv=8),
        ffn_config=hf(model_type="", ffn_hidden_size=10752, moe_num_experts=16, moe_top_k=4),
        tie_word_embeddings=False,
    ),
    "llama-4-maverick": hf(
        model_type="llama4",
        text_config=hf(
            model_type="llama4_text", num_hidden_layers=48, hidden_size=5120, num_attention_heads=40,
            num_key_value_heads=8, head_dim=128, intermediate_size=8192, intermediate_size_mlp=16384,
            num_local_experts=128, num_experts_per_tok=1, interleave_moe_layer_step=2, vocab_size=202048,
            attention_chunk_size=8192, max_position_embeddings=1048576, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_shape_of_the_catalogue(name: str) -> None:
    assert from_hf(CONFIGS[name]) == model(name)


def test_the_library_that_writes_the_configs_agrees() -> None:
    transformers = pytest.importorskip("transformers")
    assert from_hf(transformers.GptOssConfig().to_dict()) == model("gpt-oss-120b")
    scout = transformers.Llama4TextConfig(max_position_embeddings=10485760).to_dict()
    assert from_hf(scout) == model("llama-4-scout")
    deepseek = transformers.DeepseekV3Config(max_position_embeddings=163840).to_dict()
    assert from_hf(deepseek) == model("deepseek-v3")


def test_qwen2_style_windows_start_after_the_full_layers() -> None:
    config = LLAMA | hf(use_sliding_window=True, sliding_window=512, max_window_layers=30)
    assert from_hf(config).windows == (None,) * 30 + (512,) * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (hf(num_hidden_layers=None), "num_hidden_layers"),
        (hf(hidden_size="4096"), "hidden_size is '4096'"),
        (hf(vocab_size=10**10), "vocab_size"),
        (hf(num_hidden_layers=10**8), "cannot be a transformer"),
        (hf(num_key_value_heads=5), "share 5 key heads"),
        (hf(num_attention_heads=7), "head_dim is missing"),
        (hf(is_encoder_decoder=True), "encoder-decoder"),
        (hf(layer_types=["linear_attention", "full_attention"]), "linear_attention"),
        (hf(model_type="mamba"), "mamba"),
        (hf(num_local_experts=8, num_experts_per_tok=9), "9 experts a token of 8"),
    ],
)
def test_configs_that_cannot_be_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnreadableConfig, match=says):
        from_hf(LLAMA | change)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*LLAMA, "text_config", "head_dim", "layer_types", "num_local_experts"]), JSON))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_any_json_is_read_or_refused(change: dict[str, Any]) -> None:
    try:
        assert isinstance(from_hf(LLAMA | change), ModelShape)
    except HeadraceError as error:
        assert str(error)
