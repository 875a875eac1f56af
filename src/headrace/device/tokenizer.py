"""Builds a `tokenizer.json` from a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

GGUF stores the vocabulary, its merges or scores, and the name of the rule that splits text before merging. The rules
are the patterns each family of models was trained with; an unknown rule is refused, because a guess would give other
tokens than the model knows. This room writes JSON and never tokenises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.device.ggufmap import Metadata
from headrace.device.modelfile import BadModelFile

MAX_TOKEN_CHARS = 4096
_MAX_PIECE_CHARS = 512  # of a SentencePiece token; finding its merges takes the square of this

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _AFTER_WORDS
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _AFTER_WORDS
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"


@dataclass(frozen=True, slots=True)
class _Split:
    """How a family cuts text before merging: patterns applied one after the other to the pieces of the one before."""

    patterns: tuple[str, ...]
    whole_words_first: bool = False  # a piece that is a token stays whole, whatever the merges say
    begins_with_bos: bool = False
    compose: bool = False  # Unicode NFC first


_FAMILIES: Mapping[_Split, tuple[str, ...]] = {
    _Split((_GPT2,)): ("gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais"),
    _Split((r"\p{N}", _GPT2)): ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"),
    _Split((_LLAMA3,), whole_words_first=True, begins_with_bos=True): (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    _Split((_LLAMA3,)): ("smaug-bpe", "dbrx"),
    _Split((_QWEN2,), compose=True): ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"),
    _Split((_TEKKEN,), whole_words_first=True, begins_with_bos=True): ("tekken",),
    _Split((_PUNCTUATION, _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
}
SPLITS: Mapping[str, _Split] = {name: split for split, names in _FAMILIES.items() for name in names}

_ENDS = (  # names of control tokens that end a turn or a text, whatever the metadata calls the end
    *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"),
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything that the gateway needs to turn text into tokens and back."""

    tokenizer_json: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: frozenset[int]
    add_bos: bool  # a prompt starts with bos_token unless it is there already


def vocabulary_of(meta: Metadata, rows: int) -> Vocabulary:
    """From GGUF metadata; `rows` is the height of the embedding matrix. Raises BadModelFile."""
    tokens = _Tokens.read(meta, rows)
    model = meta.text("tokenizer.ggml.model")
    if model == "gpt2":
        split = _split(meta)
        spec, add_bos = _byte_level(tokens, meta, split), split.begins_with_bos
    elif model == "llama":
        spec, add_bos = _sentencepiece(tokens, meta), True
    else:
        raise BadModelFile(f"the tokenizer model {model!r:.40} is not supported; supported are gpt2 and llama")
    bos, eos = (meta.token_id(f"tokenizer.ggml.{name}_token_id", len(tokens.texts)) for name in ("bos", "eos"))
    stated = meta.flag("tokenizer.ggml.add_bos_token")
    return Vocabulary(
        tokenizer_json=json.dumps(spec, ensure_ascii=False),
        chat_template=meta.text("tokenizer.chat_template"),
        bos_token=None if bos is None else tokens.texts[bos],
        eos_token=None if eos is None else tokens.texts[eos],
        eos_token_ids=_ends(tokens, meta),
        add_bos=(add_bos if stated is None else stated) and bos is not None,
    )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The vocabulary as stored, ids being positions."""

    texts: tuple[str, ...]
    kinds: tuple[int, ...]
    ids: Mapping[str, int]

    @classmethod
    def read(cls, meta: Metadata, rows: int) -> _Tokens:
        texts = meta.items("tokenizer.ggml.tokens", str)
        if not texts:
            raise BadModelFile("the file has no vocabulary (tokenizer.ggml.tokens), so it cannot be served")
        kinds = meta.items("tokenizer.ggml.token_type", int) or (_NORMAL,) * len(texts)
        if len(texts) > rows or len(kinds) != len(texts):
            raise BadModelFile(f"{len(texts)} tokens with {len(kinds)} types do not fit an embedding of {rows} rows")
        ids = {text: token_id for token_id, text in enumerate(texts)}
        if len(ids) != len(texts) or max(map(len, texts)) > MAX_TOKEN_CHARS:
            raise BadModelFile(f"the vocabulary repeats a token or has one of more than {MAX_TOKEN_CHARS} characters")
        return cls(texts, kinds, ids)

    def of_kind(self, kind: int) -> Iterator[tuple[int, str]]:
        return ((at, text) for at, text in enumerate(self.texts) if self.kinds[at] == kind and text)

    def added(self) -> list[dict[str, Any]]:
        """Tokens matched in raw text before anything else: control tokens, and user-defined ones, which are text."""
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        special = [{"id": at, "content": text, **plain, "special": True} for at, text in self.of_kind(_CONTROL)]
        user = [{"id": at, "content": text, **plain, "special": False} for at, text in self.of_kind(_USER_DEFINED)]
        return sorted(special + user, key=lambda token: token["id"])


def _split(meta: Metadata) -> _Split:
    name = meta.text("tokenizer.ggml.pre") or "default"
    if name not in SPLITS:
        raise BadModelFile(f"the pre-tokenizer {name!r:.40} is not known; known are {', '.join(sorted(SPLITS))}")
    return SPLITS[name]


def _byte_level(tokens: _Tokens, meta: Metadata, split: _Split) -> dict[str, Any]:
    """GPT-2 style: bytes spelled as visible characters, merged in the order of the list."""
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split.patterns
    ]
    return {
        **_frame(tokens),
        "normalizer": {"type": "NFC"} if split.compose else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, to_bytes]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, list(_stored_merges(tokens, meta)), ignore_merges=split.whole_words_first),
    }


def _stored_merges(tokens: _Tokens, meta: Metadata) -> Iterator[tuple[str, str]]:
    for merge in meta.items("tokenizer.ggml.merges", str) or ():
        left, _, right = merge.partition(" ")
        if left not in tokens.ids or right not in tokens.ids or left + right not in tokens.ids:
            raise BadModelFile(f"the tokenizer merge {merge!r:.80} is not one of two tokens into a third")
        yield left, right


def _sentencepiece(tokens: _Tokens, meta: Metadata) -> dict[str, Any]:
    """SentencePiece BPE: spaces become "▁", unknown characters become bytes, the best-scored neighbours merge first."""
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer = spaces
    if meta.flag("tokenizer.ggml.add_space_prefix") is not False:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = meta.token_id("tokenizer.ggml.unknown_token_id", len(tokens.texts))
    unk_token = None if unknown is None else tokens.texts[unknown]
    model = _bpe(tokens, _scored_merges(tokens, meta), unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    return {
        **_frame(tokens),
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }


def _scored_merges(tokens: _Tokens, meta: Metadata) -> list[tuple[str, str]]:
    """All ways to cut a token into two, best score first: BPE by rank then does what SentencePiece does by score.

    Only ordinary tokens take part. The others never arise from merging: control and user-defined ones are found in the
    raw text, byte tokens stand for what no token spells.
    """
    scores = meta.items("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(tokens.texts):
        raise BadModelFile("a tokenizer of model llama needs one score per token (tokenizer.ggml.scores)")
    ordinary = {text: at for at, text in tokens.of_kind(_NORMAL)}
    if max(map(len, ordinary), default=0) > _MAX_PIECE_CHARS:
        raise BadModelFile(f"the vocabulary has a token of more than {_MAX_PIECE_CHARS} characters")
    best_first = sorted(ordinary.items(), key=lambda item: (-scores[item[1]], item[1]))
    return [
        (text[:cut], text[cut:])
        for text, _ in best_first
        for cut in range(1, len(text))
        if text[:cut] in ordinary and text[cut:] in ordinary
    ]


def _frame(tokens: _Tokens) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens.added(),
        "post_processor": None,
    }


def _bpe(tokens: _Tokens, merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": tokens.ids,
        "merges": merges,
    }


def _ends(tokens: _Tokens, meta: Metadata) -> frozenset[int]:
    stated = [meta.token_id(f"tokenizer.ggml.{name}_token_id", len(tokens.texts)) for name in ("eos", "eot", "eom")]
    named = [tokens.ids[name] for name in _ENDS if name in tokens.ids and tokens.kinds[tokens.ids[name]] == _CONTROL]
    return frozenset([*named, *(token_id for token_id in stated if token_id is not None)])
