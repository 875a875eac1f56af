"""GGUF files as checkpoints: Hugging Face names, config terms, and the order of q and k rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch

from headrace.device.checkpoint import Checkpoint, GGUFTensors, open_checkpoint
from headrace.device.modelfile import BadModelFile

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 4, 2, 8, 32, 64, 20
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
Fill = Callable[[gguf.GGUFWriter], None]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What converters do to q and k of llama models, row by row: half-rotated order to neighbour-rotated order."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + part * half + pair for head in range(heads) for pair in range(half) for part in (0, 1)]
    return rows[order]


def hf_weights(tied: bool = False, layers: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shapes |= {} if tied else {"lm_head": (VOCAB, HIDDEN)}
    shapes |= {f"model.layers.{at}.{name}": shape for at in range(layers) for name, shape in SHAPES.items()}
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.{kind}"


def stored(weights: dict[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    tensors = {gguf_name(name): values for name, values in weights.items()}
    if arch == "llama":
        tensors |= {name: interleave(values, HEADS) for name, values in tensors.items() if ".attn_q." in name}
        tensors |= {name: interleave(values, KV_HEADS) for name, values in tensors.items() if ".attn_k." in name}
    return tensors


def shape_metadata(writer: gguf.GGUFWriter, layers: int = 2) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)


def words(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def build(
    path: Path, arch: str = "llama", fill: Fill | None = None, tied: bool = False, extra: Any = None, layers: int = 2
) -> Path:
    def metadata(writer: gguf.GGUFWriter) -> None:
        shape_metadata(writer, layers)
        words(writer)
        if fill:
            fill(writer)

    return gguf_files.write(path, stored(hf_weights(tied, layers), arch) | (extra or {}), arch, metadata)


def opened(tmp_path: Path, **how: Any) -> Checkpoint:
    return open_checkpoint(build(tmp_path / "tiny.gguf", **how))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_come_out_under_the_names_and_in_the_order_they_went_in(arch: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, arch=arch, tied=tied)
    weights = hf_weights(tied)
    assert set(checkpoint.names()) == set(weights)
    for name, values in weights.items():
        assert torch.equal(checkpoint.tensor(name), torch.from_numpy(values)), name
        assert checkpoint.tensors.shape(name) == values.shape
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert checkpoint.name == "tiny"


def test_config_speaks_hugging_face(tmp_path: Path) -> None:
    config = opened(tmp_path).config
    assert {key: config[key] for key in ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")} == {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
    }
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["vocab_size"], config["max_position_embeddings"], config["rope_theta"]) == (VOCAB, 256, 5000.0)
    assert config["rms_norm_eps"] == pytest.approx(1e-5, rel=1e-6)
    assert config["rope_scaling"] is None and config["sliding_window"] is None
    assert "headrace_norm_includes_one" not in config


def test_biases_are_seen_and_reordered_like_their_weights(tmp_path: Path) -> None:
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    checkpoint = opened(tmp_path, extra={"blk.0.attn_q.bias": interleave(bias, HEADS)})
    assert checkpoint.config["attention_bias"] is True
    assert torch.equal(checkpoint.tensor("model.layers.0.self_attn.q_proj.bias"), torch.from_numpy(bias))


def test_a_window_makes_a_llama_file_a_mistral(tmp_path: Path) -> None:
    config = opened(tmp_path, fill=lambda writer: writer.add_sliding_window(64)).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)


def test_raw_rows_are_in_the_order_of_the_dequantised_ones(tmp_path: Path) -> None:
    tensors = opened(tmp_path).tensors
    assert isinstance(tensors, GGUFTensors)
    for name in tensors.names():
        block, rows = tensors.raw(name)
        assert block.name == "F32"
        assert np.array_equal(np.ascontiguousarray(rows).view(np.float32), tensors.array(name))


def test_llama3_divisors_are_handed_on(tmp_path: Path) -> None:
    divisors = np.float32([1.0, 1.0, 3.3, 8.0])
    scaling = opened(tmp_path, extra={"rope_freqs.weight": divisors}).config["rope_scaling"]
    assert scaling == {"rope_type": "factors", "factors": divisors.tolist()}


def test_linear_scaling(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    assert opened(tmp_path, fill=fill).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_gemma_says_what_its_file_leaves_out(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(512)
        writer.add_key_length(HEAD_DIM)

    config = opened(tmp_path, arch="gemma3", fill=fill, tied=True, layers=12).config
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert (config["rope_local_base_freq"], config["query_pre_attn_scalar"]) == (10_000.0, HEAD_DIM)
    assert config["headrace_norm_includes_one"] is True


def numbers(key: str, value: int) -> Fill:
    return lambda writer: writer.add_uint32(key, value)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"arch": "mamba"}, "supported are llama, qwen2, qwen3, gemma3"),
        ({"extra": {"rope_freqs.weight": np.zeros(4, np.float32)}}, "nothing can be divided by"),
        ({"extra": {"rope_freqs.weight": np.full(4, np.nan, np.float32)}}, "nothing can be divided by"),
        ({"extra": {"rope_freqs.weight": np.full(4, np.inf, np.float32)}}, "nothing can be divided by"),
        ({"extra": {"rope_freqs.weight": np.ones(3, np.float32)}}, "shape"),
        ({"extra": {"blk.0.ffn_up_exps.weight": np.ones(4, np.float32)}}, "mixture of experts"),
        ({"fill": numbers("split.count", 2)}, "one part of a split"),
        ({"fill": numbers("llama.rope.dimension_count", 4)}, "part of each head"),
        ({"fill": numbers("llama.attention.key_length", 0)}, "key_length"),
        ({"fill": numbers("llama.attention.sliding_window", 0)}, "sliding_window"),
        ({"fill": lambda writer: writer.add_string("llama.rope.scaling.type", "longrope")}, "longrope"),
    ],
)
def test_what_cannot_be_honoured_is_refused(how: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=reason):
        opened(tmp_path, **how)


@pytest.mark.parametrize("missing", ["llama.block_count", "llama.embedding_length", "llama.attention.head_count"])
def test_missing_metadata_is_named(missing: str, tmp_path: Path) -> None:
    content = build(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content.replace(missing.encode(), missing.encode()[:-1] + b"_"))
    with pytest.raises(BadModelFile, match=f"{missing} is 'missing'"):
        open_checkpoint(tmp_path / "a.gguf")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=r"model\.layers\.9\.mlp\.up_proj\.weight"):
        opened(tmp_path).tensor("model.layers.9.mlp.up_proj.weight")


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    build(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).name == "a"
    build(tmp_path / "b.gguf")
    with pytest.raises(BadModelFile, match="2 GGUF files"):
        open_checkpoint(tmp_path)


def test_damaged_metadata_never_breaks_more_than_the_file(tmp_path: Path) -> None:
    """Every 32-bit word of the metadata replaced by extremes: a checkpoint that opens, or one clear error."""
    content = build(tmp_path / "a.gguf", layers=1).read_bytes()
    for at in range(24, content.index(b"token_embd"), 2):
        for value in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\x80"):
            (tmp_path / "hit.gguf").write_bytes(content[:at] + value + content[at + 4 :])
            try:
                checkpoint = open_checkpoint(tmp_path / "hit.gguf")
                for name in checkpoint.names():
                    checkpoint.tensor(name)
            except BadModelFile:
                continue
