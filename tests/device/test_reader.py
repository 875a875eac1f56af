"""Decoders as embedding models against transformers on the same weights: every way of pooling, texts longer than the
window, batches of any make-up; and folders that ask for what there is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Model
from test_llama import MODELS, TOKENS, build
from test_llama_smollm2 import causal
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.functional import normalize

from headrace.device.encoder import MOST_TOKENS, Encoder, is_encoder, open_encoder
from headrace.device.modelfile import BadModelFile

FAMILIES = ("llama", "mistral", "qwen3, windows, biases", "qwen3_moe", "gemma3")
POOLINGS = {"mean_tokens": lambda states: states.mean(0), "cls_token": lambda states: states[0]}
POOLINGS |= {"lasttoken": lambda states: states[-1]}
IDS = [[5], list(range(3, TOKENS)), list(range(90, 40, -1))]


def folder_of(model: Any, folder: Path, pooling: str | None = "lasttoken", *modules: str) -> Path:
    """As sentence-transformers keeps a model; without `pooling`, as transformers does."""
    model.save_pretrained(folder)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(folder / "tokenizer.json"))
    if pooling is not None:
        kinds = ("Transformer", "Pooling", "Normalize", *modules)
        listed = [{"idx": at, "type": f"sentence_transformers.models.{kind}"} for at, kind in enumerate(kinds)]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        how = {"word_embedding_dimension": 48, "include_prompt": True, f"pooling_mode_{pooling}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(how))
    return folder


def vectors(encoder: Encoder, sequences: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([torch.frombuffer(bytearray(vector), dtype=torch.float32) for vector in encoder.step(sequences)])


def states(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_transformers(name: str, pooling: str, tmp_path: Path) -> None:
    """Saved without a head, as embedding models are."""
    theirs = build(*MODELS[name]).model
    encoder, _ = open_encoder(folder_of(theirs, tmp_path, pooling), name)
    expected = torch.stack([POOLINGS[pooling](states(theirs, ids)) for ids in IDS])
    assert (vectors(encoder, IDS) - normalize(expected)).abs().max() < 1e-5
    assert encoder.encoding.family == theirs.config.model_type and not is_encoder(tmp_path)


def test_a_model_that_writes_is_pooled_by_the_mean(smollm2_path: Path, smollm2: Model) -> None:
    """A GGUF file, beside the model that writes, which test_llama_smollm2.py compares with transformers."""
    encoder, _ = open_encoder(smollm2_path, "smollm2")
    llama, expected = smollm2.llama, []
    for ids in IDS:
        x = llama.embed(torch.tensor(ids))
        x = llama.layers(x, 0, llama.config.shape.layers, torch.arange(len(ids)), causal)
        expected.append(llama._norm(x).mean(0))
    assert (vectors(encoder, IDS) - normalize(torch.stack(expected))).abs().max() < 1e-4
    assert (encoder.encoding.dimensions, encoder.encoding.max_tokens) == (576, MOST_TOKENS)


def test_a_text_s_vector_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    theirs = build(*MODELS["gemma3"])
    encoder, _ = open_encoder(folder_of(theirs, tmp_path, None), "gemma3")

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.lists(st.lists(st.integers(0, 130), min_size=1, max_size=40), min_size=1, max_size=6))
    def check(sequences: list[list[int]]) -> None:
        alone = torch.cat([vectors(encoder, [one]) for one in sequences])
        assert (vectors(encoder, sequences) - alone).abs().max() < 1e-5

    check()


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    theirs = build(*MODELS["qwen3"]).model
    cases = [("max_tokens", (), "pooling_mode_max_tokens"), ("lasttoken", ("Dense",), "Dense")]
    for at, (pooling, modules, told) in enumerate(cases):
        with pytest.raises(BadModelFile, match=told):
            open_encoder(folder_of(theirs, tmp_path / str(at), pooling, *modules), "x")
    folder = folder_of(theirs, tmp_path / "both")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    with pytest.raises(BadModelFile, match="use_bidirectional_attention"):
        open_encoder(folder, "x")
    for modules in ("{}", "[1]", "[" * 99, '[{"type": "a.Dense"}]'):
        (folder / "modules.json").write_text(modules)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadModelFile):
            open_encoder(folder, "x")
