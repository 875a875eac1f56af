"""Hugging Face folders: safetensors single and sharded, configs of several generations, tokenizer files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from headrace.device.checkpoint import Checkpoint, open_checkpoint
from headrace.device.modelfile import BadModelFile
from headrace.device.weights import open_weights, read_header

SPEC: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 1, "content": "</s>", "special": True}],
    "post_processor": None,
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}
LLAMA = {"model_type": "llama", "hidden_size": 8, "eos_token_id": 1}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model.a": torch.randn(3, 4, generator=generator),
        "model.b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "model.c": torch.randint(-9, 9, (2, 2), generator=generator, dtype=torch.int8),
        "model.empty": torch.empty(0, 4),
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def folder(path: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A whole model; `files` are further JSON files by stem."""
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors(), path / "model.safetensors", metadata={"format": "pt"})
    for name, value in ({"config": config or LLAMA, "tokenizer": SPEC} | files).items():
        write_json(path / f"{name}.json", value)
    return path


def shard(path: Path, index: dict[str, str] | None = None) -> Path:
    folder(path)
    (path / "model.safetensors").unlink()
    names = list(tensors())
    placed = {name: f"model-0000{at % 2 + 1}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(placed.values()):
        safetensors.torch.save_file({name: tensors()[name] for name in names if placed[name] == file}, path / file)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": index or placed})
    return path


@pytest.mark.parametrize("make", [folder, shard])
def test_tensors_come_out_as_they_went_in(make: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "model"))
    assert set(checkpoint.names()) == set(tensors())
    for name, values in tensors().items():
        found = checkpoint.tensor(name)
        assert found.dtype == values.dtype and torch.equal(found, values)
        assert checkpoint.tensors.shape(name) == tuple(values.shape)
    assert checkpoint.file_bytes == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert checkpoint.name == "model"


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="'nothing'"):
        open_checkpoint(folder(tmp_path)).tensor("nothing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(BadModelFile, match="can run code"):
            open_checkpoint(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for missing in ("model.safetensors", "tokenizer.json"):
        folder(tmp_path)
        (tmp_path / missing).unlink()
        with pytest.raises(BadModelFile, match=missing):
            open_checkpoint(tmp_path)
    folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadModelFile, match=r"neither config\.json nor a GGUF"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"model.a": "../model-00001-of-00002.safetensors"}, "not a safetensors file of its folder"),
        ({"model.a": "/etc/x.safetensors"}, "not a safetensors file of its folder"),
        ({"model.a": "a\\b.safetensors"}, "not a safetensors file of its folder"),
        ({"model.a": "a\0.safetensors"}, "not a safetensors file of its folder"),
        ({"model.a": "model.bin"}, "not a safetensors file of its folder"),
        ({"model.a": ""}, "not a safetensors file of its folder"),
        ({"model.a": "model-00009-of-00002.safetensors"}, "is missing"),
        ({"model.a": "model-00002-of-00002.safetensors"}, "does not hold it"),
        ({"model.z": "model-00001-of-00002.safetensors"}, "does not hold it"),
        ({"model.a": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_a_lying_index_is_refused(index: Any, reason: str, tmp_path: Path) -> None:
    shard(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": index})
    with pytest.raises(BadModelFile, match=reason):
        open_weights(tmp_path)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"t": entry(offsets=(0, 16))}, "offsets span"),
        ({"t": entry(shape=(4,), offsets=(0, 16))}, "gap or a wrong length"),
        ({"t": entry(offsets=(4, 12))}, "gap"),
        ({"t": entry(), "u": entry()}, "overlapping"),
        ({"t": entry(shape=(-2,))}, "shape"),
        ({"t": entry(shape=(2.0,))}, "shape"),
        ({"t": entry(shape=(True, 2))}, "shape"),
        ({"t": entry(shape=(2**62, 2**62), offsets=(0, 2**124 * 4))}, "offsets"),
        ({"t": entry(shape=[1] * 9)}, "shape"),
        ({"t": entry(offsets=(8, 0))}, "offsets span"),
        ({"t": entry(offsets=(-8, 0))}, "offsets"),
        ({"t": entry(offsets=(0, 8, 8))}, "offsets"),
        ({"t": entry(offsets=None)}, "offsets"),
        ({"t": entry(dtype="F7")}, "dtype"),
        ({"t": entry(dtype=["F32"])}, "dtype"),
        ({"t": 5}, "no description"),
        ([], "JSON object"),
    ],
)
def test_a_lying_header_is_refused(header: Any, reason: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(BadModelFile, match=reason):
        read_header(tmp_path / "t.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 9) + b"{}"])
def test_a_lying_length_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(BadModelFile, match="declares a header"):
        read_header(tmp_path / "t.safetensors")


def test_deep_json_is_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        (tmp_path / name).write_text("[" * 200_000)
        with pytest.raises(BadModelFile, match="not valid JSON"):
            open_checkpoint(tmp_path)
        (tmp_path / name).write_bytes(kept)


def opened_or_bad(path: Path) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except BadModelFile:
        return None
    return checkpoint


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = (folder(tmp_path) / "model.safetensors").read_bytes()
    for length in range(len(content)):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        assert opened_or_bad(tmp_path) is None


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=9), st.sampled_from(["put", "insert", "remove"]))
def test_random_damage(tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes, how: str) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    if not path.exists():
        (folder(path) / "model.safetensors").rename(path / "original")
    content = bytearray((path / "original").read_bytes())
    at %= len(content)
    content[at : at + (0 if how == "insert" else len(new))] = b"" if how == "remove" else new
    (path / "model.safetensors").write_bytes(content)
    opened_or_bad(path)


# --- configs ---------------------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    return open_checkpoint(folder(tmp_path, config)).config


def test_new_spelling_of_transformers_is_given_the_old_one_too(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    source = LlamaConfig(rope_parameters={"rope_theta": 5e5, **scaling}, dtype="bfloat16")
    config = config_of(tmp_path, source.to_dict())
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (5e5, scaling, "bfloat16")
    assert config_of(tmp_path, Qwen3Config().to_dict())["rope_scaling"] is None


def test_gemma_has_two_thetas(tmp_path: Path) -> None:
    config = config_of(tmp_path, Gemma3TextConfig().to_dict())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1_000_000.0, 10_000.0)


def test_the_old_spelling_is_left_alone(tmp_path: Path) -> None:
    old = LLAMA | {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"}
    assert config_of(tmp_path, old) == old


def test_the_text_model_of_a_multimodal_gemma(tmp_path: Path) -> None:
    """Names lose their prefix; what the nested config leaves out is what transformers fills in."""
    nested = {"hidden_size": 8, "model_type": "gemma3_text", "num_hidden_layers": 1}
    outer = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": nested, "vision_config": {}}
    path = folder(tmp_path, outer)
    names = {"language_model.model.norm.weight": torch.ones(3), "vision_tower.x": torch.ones(1)}
    safetensors.torch.save_file(names, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    reference = Gemma3TextConfig(**nested)
    assert torch.equal(checkpoint.tensor("model.norm.weight"), torch.ones(3))
    assert checkpoint.eos_token_ids == {1, 106}
    filled = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar")
    for key in (*filled, "max_position_embeddings", "rms_norm_eps", "sliding_window", "hidden_activation"):
        assert checkpoint.config[key] == getattr(reference, key), key


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba", "auto_map": {"AutoModel": "evil.py"}}, "supported are .*llama, mistral"),
        ({"model_type": ["llama"]}, "supported are .*llama"),
        ({"hidden_size": 8}, "supported are .*llama"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "use a GGUF file"),
        ({"model_type": "gemma3", "text_config": 3}, "no text_config"),
    ],
)
def test_what_cannot_be_served_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=reason):
        config_of(tmp_path, config)


# --- tokenizer files -------------------------------------------------------------------------------------------------


def test_special_tokens_and_ends_come_from_all_their_files(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True},
        generation_config={"eos_token_id": [7, 9]},
        special_tokens_map={"bos_token": "<other>"},
    )
    checkpoint = open_checkpoint(path)
    assert (checkpoint.bos_token, checkpoint.eos_token, checkpoint.add_bos) == ("<s>", "</s>", True)
    assert checkpoint.eos_token_ids == {1, 7, 9}
    assert json.loads(checkpoint.tokenizer_json) == SPEC


def template_processing(first: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}]}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (template_processing({"SpecialToken": {"id": "<s>", "type_id": 0}}), True),
        ({"type": "Sequence", "processors": [{}, template_processing({"SpecialToken": {"id": "<s>"}})]}, True),
        (template_processing({"SpecialToken": {"id": "[CLS]", "type_id": 0}}), False),
        (template_processing({"Sequence": {"id": "A"}}), False),
        ({"type": "ByteLevel"}, False),
        (None, False),
        ({"processors": 5}, False),
    ],
)
def test_without_a_flag_the_post_processor_says_whether_bos_is_added(
    processor: Any, expected: bool, tmp_path: Path
) -> None:
    spec = SPEC | {"post_processor": processor}
    path = folder(tmp_path, tokenizer=spec, tokenizer_config={"bos_token": "<s>"})
    assert open_checkpoint(path).add_bos is expected


def test_chat_templates_in_order_of_precedence(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert open_checkpoint(path).chat_template is None
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_json(path / "tokenizer_config.json", {"chat_template": several})
    assert open_checkpoint(path).chat_template == "d"
    write_json(path / "tokenizer_config.json", {"chat_template": "c"})
    assert open_checkpoint(path).chat_template == "c"
    (path / "chat_template.jinja").write_text("j")
    assert open_checkpoint(path).chat_template == "j"
    (path / "chat_template.jinja").write_text("j" * (2 << 20))
    with pytest.raises(BadModelFile, match="larger than"):
        open_checkpoint(path)


def test_an_old_tokenizer_is_explained(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    with pytest.raises(BadModelFile, match=r"convert its tokenizer\.model"):
        open_checkpoint(path)
