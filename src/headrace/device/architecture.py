"""Reads a Hugging Face model config into the few choices in which members of the Llama family differ.

Everything in a config is untrusted: sizes are bounded, and what would change the answer but is not implemented is
refused by name. Owns no tensors; `device.llama` draws the model from what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from headrace.core.shape import ModelShape
from headrace.device.modelfile import BadModelFile
from headrace.device.rope import Rope

Activation = Literal["silu", "gelu_tanh"]
Windows = tuple[int | None, ...]

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
)
_PLAIN = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
_GEMMA3 = _PLAIN | {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip

# What a config of each type means by leaving a field out. The keys are the types that are supported.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": _PLAIN,
        "mistral": _PLAIN | {"sliding_window": 4096},
        "mixtral": _PLAIN | {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
        "qwen2": _PLAIN | {"sliding_window": 4096, "max_window_layers": 28},
        "qwen3": _PLAIN | {"sliding_window": 4096, "max_window_layers": 28},
        "qwen3_moe": _PLAIN | {"sliding_window": 4096},
        "smollm3": _PLAIN | {"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        "gemma3_text": _GEMMA3,
    }
)
SUPPORTED = (*sorted(_DEFAULTS), "gemma3 (text only)")


@dataclass(frozen=True, slots=True)
class Biases:
    """Which linear layers add one."""

    qkv: bool = False
    out: bool = False
    ffn: bool = False


@dataclass(frozen=True, slots=True)
class FFNNames:
    """What checkpoints call the feed-forward, in the order gate, up, down."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """One member of the family: its numbers and where it departs from Llama."""

    model_type: str
    shape: ModelShape
    norm_eps: float
    attention_scale: float  # multiplies q·k
    ropes: tuple[Rope | None, ...]  # per layer; None: the layer knows no positions
    activation: Activation = "silu"
    biases: Biases = Biases()
    head_norms: bool = False  # q and k of each head are normalised before RoPE (Qwen 3, Gemma 3)
    sandwich_norms: bool = False  # the output of attention and of the feed-forward is normalised too (Gemma)
    norm_adds_one: bool = False  # a norm multiplies by 1 + weight (Gemma)
    embedding_scale: float = 1.0
    renormalise_experts: bool = False  # the weights of the chosen experts are made to sum to 1
    ffn_names: FFNNames = FFNNames()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From the contents of `config.json`. Raises BadModelFile naming the field and what is supported.

        `headrace_norm_includes_one` says that stored Gemma norm weights have the 1 added already, as in GGUF files.
        """
        kind, fields = _text_fields(config)
        _refuse_unknown(kind, config, fields)
        shape = _shape(kind, fields)
        gemma = kind == "gemma3_text"
        pre_scale = fields.number("query_pre_attn_scalar") if gemma else shape.head_dim
        attention_bias = fields.flag("attention_bias")
        return cls(
            model_type=kind,
            shape=shape,
            norm_eps=fields.number("rms_norm_eps"),
            attention_scale=pre_scale**-0.5,
            ropes=_ropes(kind, fields, shape),
            activation=_activation(fields),
            biases=Biases(
                attention_bias or kind == "qwen2", attention_bias and kind != "qwen2", fields.flag("mlp_bias")
            ),
            head_norms=gemma or kind in ("qwen3", "qwen3_moe"),
            sandwich_norms=gemma,
            norm_adds_one=gemma and not config.get("headrace_norm_includes_one", False),
            embedding_scale=shape.hidden**0.5 if gemma else 1.0,
            renormalise_experts=kind == "mixtral" or fields.flag("norm_topk_prob"),
            ffn_names=FFNNames("block_sparse_moe", "w1", "w3", "w2") if kind == "mixtral" else FFNNames(),
        )


class _Fields:
    """Typed, bounded reads from an untrusted config with the defaults of its model type; null is the default."""

    __slots__ = ("_config", "_defaults")

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._config = config
        self._defaults = defaults

    def get(self, name: str) -> Any:
        value = self._config.get(name)
        return self._defaults.get(name) if value is None else value

    def count(self, name: str, most: int, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            _refuse(name, value, f"a whole number from 1 to {most}")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
            _refuse(name, value, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            _refuse(name, value, "true or false")
        return bool(value)

    def per_layer(self, name: str, layers: int, allowed: tuple[object, ...]) -> list[Any] | None:
        """A list with one of `allowed` for each layer; it may be longer, as some published ones are."""
        values = self.get(name)
        if values is None:
            return None
        if not isinstance(values, list | tuple) or len(values) < layers or any(v not in allowed for v in values):
            _refuse(name, values, f"{layers} values out of {allowed}")
        return list(values[:layers])

    def window(self) -> int | None:
        """Unlike elsewhere, an explicit null is a value here: no window."""
        if "sliding_window" in self._config and self._config["sliding_window"] is None:
            return None
        return self.count("sliding_window", 2**24) if self.get("sliding_window") is not None else None

    def mapping(self, *names: str) -> Mapping[str, Any]:
        """The first of these that is present and not empty."""
        for name in names:
            if value := self.get(name):
                return value if isinstance(value, Mapping) else _refuse(name, value, "a table")
        return {}


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise BadModelFile(f"The model config is wrong: {name} must be {wanted}, not {repr(value)[:80]}.")


def _text_fields(config: Mapping[str, Any]) -> tuple[str, _Fields]:
    """The model type and the fields of its text part."""
    kind = config.get("model_type")
    if kind == "gemma3":
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            _refuse("text_config", inner, "a table")
        kind, config = "gemma3_text", inner
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise BadModelFile(f"Model type {repr(kind)[:80]} is not supported; supported: {', '.join(SUPPORTED)}.")
    return kind, _Fields(config, _DEFAULTS[kind])


def _refuse_unknown(kind: str, config: Mapping[str, Any], fields: _Fields) -> None:
    """Refuses what would silently change the answer."""
    names = config.get("architectures") or []
    if not isinstance(names, list | tuple):
        _refuse("architectures", names, "a list of names")
    if names and not any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names):
        raise BadModelFile(
            f"The checkpoint holds {repr(names)[:80]}, which does not generate text: use a *ForCausalLM."
        )
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if fields.get(name):
            raise BadModelFile(f"The model config sets {name}, which is not supported.")
    if kind == "qwen3_moe" and (fields.get("mlp_only_layers") or fields.get("decoder_sparse_step") not in (None, 1)):
        raise BadModelFile("Models that mix dense layers with mixture-of-experts layers are not supported.")


def _shape(kind: str, fields: _Fields) -> ModelShape:
    layers, heads = fields.count("num_hidden_layers", 1024), fields.count("num_attention_heads", 1024)
    hidden, kv_heads = fields.count("hidden_size", 2**17), fields.count("num_key_value_heads", 1024, heads)
    if heads % kv_heads:
        _refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    if fields.get("head_dim") is None and hidden % heads:
        _refuse("hidden_size", hidden, f"a multiple of num_attention_heads ({heads}) when there is no head_dim")
    experts, chosen = _experts(kind, fields)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=fields.count("head_dim", 1024, hidden // heads),
        ffn=fields.count("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size", 2**20),
        vocab=fields.count("vocab_size", 2**22),
        max_context_tokens=_context(fields),
        tied_embedding=fields.flag("tie_word_embeddings"),
        experts=experts,
        experts_per_token=chosen,
        windows=_windows(kind, fields, layers),
    )


def _experts(kind: str, fields: _Fields) -> tuple[int, int]:
    """How many there are and how many a token is sent to; none in dense models."""
    if kind not in ("mixtral", "qwen3_moe"):
        return 0, 0
    name = "num_experts" if fields.get("num_experts") is not None else "num_local_experts"
    experts = fields.count(name, 4096)
    return experts, fields.count("num_experts_per_tok", experts)


def _context(fields: _Fields) -> int:
    """The longest sequence. Dynamic and YaRN models state the context before stretching, the others after it."""
    longest = fields.count("max_position_embeddings", 2**24)
    scaling = fields.mapping("rope_scaling", "rope_parameters")
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind not in ("dynamic", "yarn"):
        return longest
    rope = Rope.from_hf(scaling, 1e4, 64, longest)
    return min(2**24, max(longest, int(rope.original_tokens * rope.factor)))


def _windows(kind: str, fields: _Fields, layers: int) -> Windows:
    """Attention window of each layer; empty when no layer has one."""
    switchable = kind in ("qwen2", "qwen3", "qwen3_moe", "smollm3")
    window = None if switchable and not fields.flag("use_sliding_window") else fields.window()
    if window is None or kind == "llama":
        return ()
    if kind in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * layers
    sliding = [name == "sliding_attention" for name in _layer_types(kind, fields, layers)]
    return tuple(window if slides else None for slides in sliding) if any(sliding) else ()


def _layer_types(kind: str, fields: _Fields, layers: int) -> list[str]:
    given = fields.per_layer("layer_types", layers, ("sliding_attention", "full_attention"))
    if given is not None:
        return given
    if kind == "gemma3_text":
        pattern = fields.count("sliding_window_pattern", 1024)
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif kind == "smollm3":
        slides = [not turns for turns in _turning_layers(kind, fields, layers)]
    else:
        first = fields.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            _refuse("max_window_layers", first, "a whole number")
        slides = [layer >= first for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _turning_layers(kind: str, fields: _Fields, layers: int) -> list[bool]:
    """Which layers have RoPE. SmolLM 3 leaves it out in every fourth; its list says 1 where there is RoPE."""
    if kind != "smollm3":
        return [True] * layers
    given = fields.per_layer("no_rope_layers", layers, (0, 1))
    if given is not None:
        return [bool(each) for each in given]
    interval = fields.count("no_rope_layer_interval", 1024)
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def _ropes(kind: str, fields: _Fields, shape: ModelShape) -> tuple[Rope | None, ...]:
    scaling = fields.mapping("rope_scaling", "rope_parameters")
    theta, longest = fields.number("rope_theta"), fields.count("max_position_embeddings", 2**24)
    if kind == "gemma3_text":
        full, sliding = _gemma_ropes(fields, scaling, theta, shape.head_dim, longest)
        types = _layer_types(kind, fields, shape.layers)
        return tuple(sliding if each == "sliding_attention" else full for each in types)
    rope = Rope.from_hf(scaling, theta, shape.head_dim, longest)
    return tuple(rope if turns else None for turns in _turning_layers(kind, fields, shape.layers))


def _gemma_ropes(
    fields: _Fields, scaling: Mapping[str, Any], theta: float, head_dim: int, longest: int
) -> tuple[Rope, Rope]:
    """Of full and of sliding layers. Older configs scale the full layers only and name the local base apart."""
    local_theta = fields.number("rope_local_base_freq")
    nested = [scaling.get("full_attention"), scaling.get("sliding_attention")]
    full, sliding = ({} if each is None else each for each in nested) if any(nested) else (scaling, {})
    if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        _refuse("rope_parameters", scaling, "a table for each kind of layer")
    return Rope.from_hf(full, theta, head_dim, longest), Rope.from_hf(sliding, local_theta, head_dim, longest)


def _activation(fields: _Fields) -> Activation:
    name = fields.get("hidden_activation") or fields.get("hidden_act")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise BadModelFile(f"Activation {repr(name)[:80]} is not supported; supported: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]
