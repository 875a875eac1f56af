"""Whatever schema a client sends, what is drawn to the end follows it: with the vocabulary of a real model."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from headrace.cli.assemble import Phases, open_model, text_of
from headrace.core.types import Request, Tokens
from headrace.device.control import Controls
from headrace.device.grammar import Grammars, Vocabulary
from headrace.gateway.speech.demand import json_schema

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
from schemas import schema

MOST_TOKENS = 600


@pytest.fixture(scope="module")
def controls() -> Controls:
    text = text_of(open_model("smollm2", Phases()))
    vocabulary = Vocabulary(text.names, text.special_ids, text.eos_token_ids, text.plain_ids)
    return Controls(Grammars(vocabulary), len(text.names))


def drawn(controls: Controls, number: int) -> tuple[str, bool]:
    """What a model that knows nothing writes, and whether it ended: any token, but short ones rather than long."""
    grammar = json_schema(schema(number), "response_format")
    control = controls.of(Request("a", (Tokens((1,)),), 0.0, MOST_TOKENS, grammar=grammar), ())
    assert control is not None
    vocabulary = controls._grammars.vocabulary
    rng, written = random.Random(number), b""
    for _ in range(MOST_TOKENS):
        (mask,) = control.masks(())
        assert mask is not None and control.failure is None
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        ends = [token for token in vocabulary.end_ids if token in allowed]
        sample = ends or [int(token) for token in rng.choices(allowed, k=3)]
        closing = [token for token in allowed[:40] if vocabulary.pieces[token] in (b'"', b"}", b"]")]
        token = int(rng.choice(closing)) if closing and rng.random() < 0.5 else rng.choice(sample)
        control.drew([token])
        if token in vocabulary.end_ids:
            return written.decode(), True
        written += vocabulary.pieces[token]
    return written.decode(errors="replace"), False


def check(controls: Controls, numbers: range) -> None:
    ended = 0
    for number in numbers:
        text, complete = drawn(controls, number)
        ended += complete
        if complete:
            jsonschema.validate(json.loads(text), schema(number))
    assert ended >= 0.8 * len(numbers), f"only {ended} of {len(numbers)} came to an end"


def test_a_sample_of_schemas(controls: Controls) -> None:
    check(controls, range(30))


@pytest.mark.slow
def test_three_hundred_schemas(controls: Controls) -> None:
    check(controls, range(300))
