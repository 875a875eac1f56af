"""Every member of the family against transformers with the same random weights, and rows that know no neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from headrace.core.types import HeadraceError
from headrace.device.reference.llama import _ACTIVATIONS, Llama, LlamaConfig, _Norm
from headrace.device.reference.rotary import Rotary
from headrace.device.rope import Rope

CPU = torch.device("cpu")
TOKENS = 100  # more than every window and every trained context below
SIZES = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 13}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
GEMMA_ROPES = {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, biases, own head_dim": ("Llama", {"tie_word_embeddings": True, "attention_bias": True,
                                                    "mlp_bias": True, "head_dim": 16}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, yarn with mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7,
                                                                     "beta_fast": 8, "truncate": False}}),
    "mistral": ("Mistral", {"sliding_window": 13}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", SLIDING | {"max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, windows, biases": ("Qwen3", SLIDING | {"head_dim": 16, "max_window_layers": 1, "attention_bias": True}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}),
    "qwen3_moe, renormalised": ("Qwen3Moe", SLIDING | {"num_experts": 4, "num_experts_per_tok": 2,
                                                       "moe_intermediate_size": 20, "norm_topk_prob": True}),
    "smollm3": ("SmolLM3", {}),
    "smollm3, windows": ("SmolLM3", SLIDING | {"no_rope_layers": [1, 0, 0, 1]}),
    "gemma3": ("Gemma3", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 13,
                          "sliding_window_pattern": 3}),
    "gemma3, scaled": ("Gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 13,
                                  "sliding_window_pattern": 2, "rope_parameters": GEMMA_ROPES}),
}  # fmt: skip


def build(family: str, extra: dict[str, Any]) -> Any:
    """A transformers model with weights that matter: no norm is one, no bias is nil."""
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**SIZES | extra, attn_implementation="eager")
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.3 * weight.shape[-1] ** -0.5)
        else:
            center = 1.0 if "norm" in name and family != "Gemma3" else 0.0
            torch.nn.init.normal_(weight, mean=center, std=0.3)
    return model


def hub_tensors(model: Any) -> dict[str, Tensor]:
    """The state under the names of published checkpoints, which keep experts apart."""
    mixtral = model.config.model_type == "mixtral"
    block, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2") if mixtral else ("mlp", "gate_proj", "up_proj",
                                                                                   "down_proj")  # fmt: skip
    tensors = {}
    for name, weight in model.state_dict().items():
        name = name.replace(".mlp.", f".{block}.")
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(weight):
                at = name.removesuffix("gate_up_proj") + f"{expert}."
                tensors[f"{at}{gate}.weight"], tensors[f"{at}{up}.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            at = name.removesuffix("down_proj")
            tensors |= {f"{at}{expert}.{down}.weight": each for expert, each in enumerate(weight)}
        else:
            tensors[name] = weight
    return tensors


def plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.linear(x, weight, bias)


def row_by_row(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Rows that cannot know of each other, because each is multiplied alone."""

    def apply(x: Tensor) -> Tensor:
        rows = torch.stack([torch.mv(weight, row) for row in x])
        return rows if bias is None else rows + bias

    return apply


def ours(model: Any, linear: Any = plain, dtype: torch.dtype = torch.float32) -> Llama:
    config = LlamaConfig.from_hf(model.config.to_dict())
    return Llama(config, hub_tensors(model).__getitem__, linear, dtype, CPU)


class Dense:
    """Attention of one sequence given whole, by the formula."""

    def __init__(self, config: LlamaConfig) -> None:
        self.windows = config.shape.windows or (None,) * config.shape.layers
        self.scale = config.attention_scale

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, groups, window = len(q), q.shape[1] // k.shape[1], self.windows[layer]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * self.scale
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        hidden = (distance < 0) | (distance >= (window or tokens))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def forward(llama: Llama, ids: Tensor) -> Tensor:
    x = llama.embed(ids)
    x = llama.layers(x, 0, llama.config.shape.layers, torch.arange(len(ids)), Dense(llama.config))
    return llama.logits(x)


def some_ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_equal_transformers(name: str) -> None:
    model = build(*MODELS[name])
    expected = model(some_ids()[None]).logits[0]
    found = forward(ours(model), some_ids())
    assert found.dtype == torch.float32
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= 1e-4


@torch.inference_mode()
def test_dynamic_rope_equals_transformers_token_by_token() -> None:
    """Beyond the trained context of 32 a token turns as in a sequence that ends with it, as decoding computes."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    model = build("Llama", {"rope_parameters": dynamic, "max_position_embeddings": 32})
    ids, cache, expected = some_ids(90), None, []
    for chunk in (ids[:32], *ids[32:].split(1)):
        answer = model(chunk[None], past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        expected.append(answer.logits[0])
    llama = ours(model)
    assert llama.config.shape.max_context_tokens == 96
    assert (forward(llama, ids) - torch.cat(expected)).abs().max() <= 1e-4


@torch.inference_mode()
def test_given_factors_are_another_form_of_llama3() -> None:
    scaled = Rope.from_hf(LLAMA3, 1e4, 16, 128)
    divisors = (Rope(16, 5e5, 128).frequencies() / scaled.frequencies()).tolist()
    given = Rope.from_hf({"rope_type": "factors", "factors": divisors}, 5e5, 16, 128)
    torch.testing.assert_close(given.frequencies(), scaled.frequencies(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda params: params.get("rope_type", "default"),
)
def test_both_ways_to_turn_agree(params: dict[str, Any]) -> None:
    """numpy's tables, which native kernels read, and torch's, within a context of 128 and beyond."""
    rope = Rope.from_hf(params, 1e4, 16, 128)
    cos, sin = torch.from_numpy(rope.turns(100, 300)).chunk(2, -1)
    rotation = Rotary(rope, CPU).at(torch.arange(100, 300))
    torch.testing.assert_close(rotation.cos[:, 0, :8], cos, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation.sin[:, 0, 8:], sin, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2, windows", "gemma3", "smollm3", "mixtral"])
@torch.inference_mode()
def test_layer_ranges_compose(name: str) -> None:
    llama = ours(build(*MODELS[name]))
    positions, attend, x = torch.arange(TOKENS), Dense(llama.config), llama.embed(some_ids())
    kept = x.clone()
    whole = llama.layers(x, 0, 4, positions, attend)
    assert torch.equal(x, kept), "layers must not change their input"
    for cut in range(5):
        part = llama.layers(x, 0, cut, positions, attend)
        assert torch.equal(llama.layers(part, cut, 4, positions, attend), whole)


def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands in for attention with something that is a row's own and uses all of q, k and v."""
    groups = q.shape[1] // k.shape[1]
    return q * k.repeat_interleave(groups, 1) + v.repeat_interleave(groups, 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["llama, yarn", "qwen3", "qwen3_moe, renormalised", "mixtral", "gemma3, scaled"])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_every_batch(name: str, threads: int) -> None:
    """Widths are no multiple of a vector, and three threads share a step unevenly."""
    family, extra = MODELS[name]
    if not family.endswith(("Moe", "Mixtral")):
        extra = extra | {"intermediate_size": 301}  # T = 512 is enough for torch to use threads
    llama = ours(build(family, extra), row_by_row)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(SIZES["vocab_size"], (512,), generator=generator)
    positions = torch.randint(128, (512,), generator=generator)

    def rows(select: Tensor) -> Tensor:
        return llama.logits(llama.layers(llama.embed(ids[select]), 0, 4, positions[select], mix))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = rows(torch.arange(512))
        for size in (1, 2, 7, 33, 150):
            select = torch.randperm(512, generator=generator)[:size]
            assert torch.equal(rows(select), together[select]), f"{size} rows"
    finally:
        torch.set_num_threads(before)


def _turn(x: Tensor) -> Tensor:
    """Turns x [T, 10] as one head, by angles that are a function of the row."""
    rotation = Rotary(Rope(10, 1e4, 4096), CPU).at((x[:, 0].abs() * 1000).long())
    return rotation.turn(x[:, None])[:, 0]


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: _ACTIVATIONS["silu"](x, x),
    "gelu_tanh": lambda x: _ACTIVATIONS["gelu_tanh"](x, x),
    "rope": _turn,
    "norm": _Norm(torch.linspace(0.5, 1.5, 10), 1e-6),
    "shares": lambda x: torch.cat(_shares(x), -1),
}


def _shares(x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.softmax(-1).topk(3)
    return top.values / top.values.sum(-1, keepdim=True), top.indices.float()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_kernels_have_no_seams(kernel: str, threads: int) -> None:
    """Rows of ten lie across vectors when together and in a vector's remainder when alone."""
    x = torch.randn(20_000, 10, generator=torch.Generator().manual_seed(5)) * 3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = KERNELS[kernel](x)
        assert all(torch.equal(KERNELS[kernel](x[row : row + 1])[0], together[row]) for row in range(2000))
        for first, last in ((1, 4000), (3, 17_001), (12_345, 12_349), (19_990, 20_000)):
            assert torch.equal(KERNELS[kernel](x[first:last]), together[first:last])
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_dynamic_angles_depend_on_the_row_only() -> None:
    rotary = Rotary(Rope.from_hf({"rope_type": "dynamic", "factor": 2.0}, 1e4, 20, 50), CPU)
    together = rotary.at(torch.arange(99))
    for position in range(99):
        alone = rotary.at(torch.tensor([position]))
        assert torch.equal(alone.cos[0], together.cos[position])
        assert torch.equal(alone.sin[0], together.sin[position])


@torch.inference_mode()
def test_experts_are_asked_in_exact_row_counts() -> None:
    """A linear layer that only accepts padded row counts still serves a mixture, with the same result."""
    model = build(*MODELS["mixtral"])

    def picky(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            assert len(x) % 8 == 0
            return functional.linear(x, weight, bias)

        return apply

    config = LlamaConfig.from_hf(model.config.to_dict())
    padded = Llama(config, hub_tensors(model).__getitem__, picky, torch.float32, CPU, lambda rows: -(-rows // 8) * 8)
    assert (forward(padded, some_ids(96)) - forward(ours(model), some_ids(96))).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral"])
@torch.inference_mode()
def test_bf16_stays_close_to_fp32(name: str) -> None:
    model = build(*MODELS[name])
    exact, rounded = forward(ours(model), some_ids()), forward(ours(model, dtype=torch.bfloat16), some_ids())
    assert rounded.dtype == torch.float32
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < (0.25 if name == "mixtral" else 0.06), error  # a router may choose another expert


@torch.inference_mode()
def test_gemma_norms_may_include_the_one() -> None:
    model = build(*MODELS["gemma3"])
    tensors = {name: w + 1 if "norm" in name else w for name, w in hub_tensors(model).items()}
    config = LlamaConfig.from_hf(model.config.to_dict() | {"headrace_norm_includes_one": True})
    llama = Llama(config, tensors.__getitem__, plain, torch.float32, CPU)
    assert torch.equal(forward(llama, some_ids()), forward(ours(model), some_ids()))


def test_a_tensor_of_the_wrong_shape_is_named() -> None:
    model = build(*MODELS["llama"])
    tensors = hub_tensors(model) | {"model.layers.2.mlp.up_proj.weight": torch.zeros(75, 48)}
    config = LlamaConfig.from_hf(model.config.to_dict())
    with pytest.raises(HeadraceError, match=r"layers\.2\.mlp\.up_proj\.weight has shape \[75, 48\].*\[76, 48\]"):
        Llama(config, tensors.__getitem__, plain, torch.float32, CPU)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bytes_counted_here_and_packed_elsewhere_are_all_there_are(name: str) -> None:
    model, packed = build(*MODELS[name]), []

    def counting(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        packed.append(weight.nbytes)
        return plain(weight, bias)

    llama = ours(model, counting)
    heads = 4 * 4 * 16 * (6 + 2 - 2) if name == "gemma3" else 0  # q and k norms are spread over the heads
    tied = model.config.tie_word_embeddings * 4 * 131 * 48
    assert llama.nbytes + sum(packed) == sum(p.nbytes for p in model.parameters()) + heads + tied
