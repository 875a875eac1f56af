"""The embedding model against transformers on the same weights, alone and in batches of any make-up."""

from __future__ import annotations

import struct

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import home
from headrace.device import sources
from headrace.device.encoder import open_encoder
from headrace.device.modelfile import BadModelFile
from headrace.device.reference.bert import BertConfig

PATH = sources.resolve(sources.EMBEDDING_DEFAULT, home())
ENCODER, TOKENIZER_JSON = open_encoder(PATH, "minilm")
TEXTS = ["A headrace feeds the wheel.", "hi", "What is the capital of France? " * 30, "água 水 🌊"]


def vectors(sequences: list[list[int]]) -> torch.Tensor:
    return torch.tensor([struct.unpack("<384f", vector) for vector in ENCODER.step(sequences)])


def test_vectors_are_those_of_transformers() -> None:
    words = tokenizers.Tokenizer.from_str(TOKENIZER_JSON)
    words.no_truncation()
    words.no_padding()
    model = transformers.AutoModel.from_pretrained(PATH).eval()
    ids = [words.encode(text).ids for text in TEXTS]
    with torch.no_grad():
        means = [model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in ids]
    expected = torch.nn.functional.normalize(torch.stack(means))
    assert (vectors(ids) - expected).abs().max() < 1e-5


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 30521), min_size=1, max_size=40), min_size=1, max_size=6))
def test_a_text_s_vector_does_not_depend_on_its_batch(sequences: list[list[int]]) -> None:
    together = vectors(sequences)
    alone = torch.cat([vectors([one]) for one in sequences])
    assert (together - alone).abs().max() < 1e-5
    assert (together.norm(dim=1) - 1).abs().max() < 1e-5


def test_the_folder_says_what_it_takes_and_gives() -> None:
    encoding = ENCODER.encoding
    assert (encoding.dimensions, encoding.max_tokens, encoding.vocab) == (384, 256, 30522)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"}, {"hidden_act": "relu"}, {"hidden_size": 0}, {"num_attention_heads": 7},
        {"vocab_size": 1 << 40}, {"num_hidden_layers": -1}, {"layer_norm_eps": "x"}, {"intermediate_size": None},
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    good = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    good |= {"intermediate_size": 8, "max_position_embeddings": 8}
    assert BertConfig.from_hf(good).hidden == 8
    with pytest.raises(BadModelFile):
        BertConfig.from_hf(good | change)
