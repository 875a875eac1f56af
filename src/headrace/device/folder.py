"""Reads what a Hugging Face folder says besides weights: its config in one form, and its tokenizer files.

Configs come in several generations: `rope_scaling` or `rope_parameters`, `torch_dtype` or `dtype`, text models alone
or inside a multimodal one. `read_config` returns the keys as they are plus the older spelling of each, so that
readers need one. Owns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.device.architecture import SUPPORTED
from headrace.device.modelfile import BadModelFile, parse_object, read_object, read_text
from headrace.device.tokenizer import Vocabulary

_MAX_TEMPLATE_BYTES = 1 << 20

_GEMMA3_TEXT: Mapping[str, Any] = {  # what published multimodal configs leave out
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a supported text model. Raises BadModelFile."""
    config = read_object(folder / "config.json")
    kind = config.get("model_type")
    if kind not in (*SUPPORTED, "gemma3"):
        raise BadModelFile(f"{folder} has the model type {kind!r:.60}; supported are {', '.join(SUPPORTED)}")
    if config.get("quantization_config"):
        raise BadModelFile(f"{folder} holds quantised safetensors, which are not supported; use a GGUF file instead")
    if kind == "gemma3":
        config = _text_part(config, folder)
    return config | _older_spelling(config)


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """tokenizer.json and what the files around it say. Raises BadModelFile naming the file that is missing."""
    if not (folder / "tokenizer.json").is_file():
        hint = "; convert its tokenizer.model first" if (folder / "tokenizer.model").is_file() else ""
        raise BadModelFile(f"{folder / 'tokenizer.json'} is missing, so text cannot be turned into tokens{hint}")
    text = read_text(folder / "tokenizer.json")
    spec = parse_object(text, str(folder / "tokenizer.json"))
    settings = _optional(folder / "tokenizer_config.json")
    names = _optional(folder / "special_tokens_map.json")
    bos, eos = (_token_text(settings.get(key)) or _token_text(names.get(key)) for key in ("bos_token", "eos_token"))
    stated = settings.get("add_bos_token")
    starts = stated if isinstance(stated, bool) else _template_start(spec) == bos
    return Vocabulary(
        tokenizer_json=text,
        chat_template=_chat_template(folder, settings),
        bos_token=bos,
        eos_token=eos,
        eos_token_ids=_eos_ids(folder, config, spec, eos),
        add_bos=starts and bos is not None,
    )


def _text_part(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The language model of a multimodal config; end tokens are stated outside of it."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise BadModelFile(f"{folder / 'config.json'} has no text_config, so the size of its text model is unknown")
    outer = {key: config[key] for key in ("eos_token_id", "bos_token_id", "torch_dtype", "dtype") if key in config}
    return {**_GEMMA3_TEXT, **outer, **text}


def _older_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling`, `rope_local_base_freq` and `torch_dtype` where a config has only the new keys."""
    old: dict[str, Any] = {}
    if "torch_dtype" not in config and "dtype" in config:
        old["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return old
    if isinstance(local := rope.get("sliding_attention"), dict) and "rope_theta" in local:
        old["rope_local_base_freq"] = local["rope_theta"]
    whole = rope.get("full_attention", rope)
    if isinstance(whole, dict):
        scaled = whole.get("rope_type", "default") != "default"
        old["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"} if scaled else None
        old |= {"rope_theta": whole["rope_theta"]} if "rope_theta" in whole else {}
    return old


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _token_text(value: Any) -> str | None:
    """A special token, written as a string or as an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over chat_template.json, both over tokenizer_config.json; of several, the default."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja", _MAX_TEMPLATE_BYTES)
    found = _optional(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _eos_ids(folder: Path, config: Mapping[str, Any], spec: Mapping[str, Any], eos: str | None) -> frozenset[int]:
    """What generation_config.json or config.json state, and the tokenizer's own end token."""
    stated = [_optional(folder / "generation_config.json").get("eos_token_id"), config.get("eos_token_id")]
    ids = {item for value in stated for item in (value if isinstance(value, list) else [value]) if type(item) is int}
    added = spec.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == eos and type(token.get("id")) is int:
            ids.add(token["id"])
    return frozenset(item for item in ids if item >= 0)


def _template_start(spec: Mapping[str, Any]) -> str | None:
    """The special token that the tokenizer's own post-processor puts before a single text, if it does."""
    processor = spec.get("post_processor")
    steps = processor.get("processors") if isinstance(processor, dict) and "processors" in processor else [processor]
    for step in steps if isinstance(steps, list) else ():
        template = step.get("single") if isinstance(step, dict) and step.get("type") == "TemplateProcessing" else None
        first = template[0] if isinstance(template, list) and template else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(special, dict):
            return _token_text(special.get("id"))
    return None
