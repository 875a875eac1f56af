"""A model that writes is the embedding model as well, under one name, over a socket and with the official client."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import openai
import pytest
import tiny_chat

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
from gateway_rig import BYTE_LEVEL


@pytest.mark.parametrize("engine", ["process", "thread"])
def test_a_model_that_writes_also_embeds(tmp_path: Path, engine: str) -> None:
    folder = tiny_chat.write(tmp_path / "tiny", BYTE_LEVEL)
    flags = ("--embedding-model", str(folder), "--engine", engine, "--kv-memory", "16MiB", "--dtype", "fp32")
    with tiny_chat.serving(folder, *flags, "--state-dir", str(tmp_path / "state")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        found = client.embeddings.create(model="tiny", input=["a mill", "a wheel that turns"])
        assert [math.hypot(*one.embedding) for one in found.data] == pytest.approx([1.0, 1.0], abs=1e-5)
        assert found.data[0].embedding != found.data[1].embedding
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens > 0  # type: ignore[union-attr]
