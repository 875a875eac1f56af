"""The embedded default model, dequantised, against transformers reading the same file."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from rig import CPU, Model, Rig, request
from test_metamorphic import NO_CACHE, alone, requests
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from headrace.core.types import Sampling
from headrace.device.checkpoint import Checkpoint
from headrace.device.reference.llama import Llama

PROMPTS = (
    "A headrace is the channel that",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Der Müller öffnet das Wehr, und das Wasser schießt durch den Graben. " * 12,
)
SUBJECTS = (
    "rivers", "mills", "the moon", "bread", "Paris", "a small dog", "winter", "trains", "bees", "chess",
    "iron", "the sea", "maps", "a library", "clocks", "rain", "mathematics", "gardens", "bridges", "salt",
)  # fmt: skip


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@torch.inference_mode()
def test_logits_equal_transformers(smollm2_checkpoint: Checkpoint, smollm2: Model, smollm2_theirs: Any) -> None:
    llama: Llama = smollm2.llama
    tokenizer = Tokenizer.from_str(smollm2_checkpoint.tokenizer_json)
    assert llama.config.shape.tied_embedding
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        expected = smollm2_theirs(torch.tensor([ids])).logits[0]
        padded = torch.tensor(ids + [0] * (smollm2.linears.padded(len(ids)) - len(ids)), device=CPU)
        x = llama.layers(llama.embed(padded), 0, llama.config.shape.layers, torch.arange(len(padded)), causal)
        assert (llama.logits(x)[: len(ids)] - expected).abs().max() <= 1e-4, prompt


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.slow)])
@torch.inference_mode()
def test_64_greedy_tokens_equal_transformers(
    smollm2_checkpoint: Checkpoint, smollm2: Model, smollm2_theirs: Any, count: int
) -> None:
    """Several prompts, continued by the whole engine in one batch and by transformers in another."""
    tokenizer = Tokenizer.from_str(smollm2_checkpoint.tokenizer_json)
    texts = [
        f"<|im_start|>user\nWrite a few lines about {subject}.<|im_end|>\n<|im_start|>assistant\n"
        for subject in SUBJECTS[:count]
    ]
    prompts = [tokenizer.encode(text).ids for text in texts]
    greedy = Sampling(temperature=0)
    ours = Rig(smollm2, budget=256).run([request(str(n), ids, 64, greedy) for n, ids in enumerate(prompts)])
    for length in sorted(set(map(len, prompts))):  # transformers' batches without padding, which would change its sums
        chosen = [n for n, ids in enumerate(prompts) if len(ids) == length]
        ids = torch.tensor([prompts[n] for n in chosen])
        mask = torch.ones_like(ids)
        done = smollm2_theirs.generate(
            ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        for n, row in zip(chosen, done[:, length:].tolist(), strict=True):
            assert list(ours[str(n)].token_ids) == row, texts[n]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [16, 64, 512])
def test_metamorphic_matrix(smollm2: Model, budget: int) -> None:
    """As test_metamorphic.py, with real weights; `benchmarks/metamorphic.py` prints the whole table."""
    batch = requests(12, shared=48, vocab=49152, longest=80)
    reference = alone(smollm2, batch)
    assert Rig(smollm2, budget=budget, settings=NO_CACHE).run(batch) == reference
    rig = Rig(smollm2, budget=budget, blocks=18)
    assert rig.run(batch) == reference
    assert rig.preemptions > 0 or budget == 16  # so small a budget keeps few requests running


def test_real_weights_do_not_see_their_batch(smollm2: Model) -> None:
    rng = random.Random(1)
    batch = [
        request(
            str(n), [rng.randrange(49152) for _ in range(rng.randrange(1, 60))], 6, Sampling(temperature=0, logprobs=1)
        )
        for n in range(8)
    ]
    assert Rig(smollm2, budget=32).run(batch) == alone(smollm2, batch)
