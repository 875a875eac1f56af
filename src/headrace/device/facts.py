"""What an opened model's files say, as values that need no torch."""

from __future__ import annotations

from math import prod
from pathlib import Path

from headrace.core.facts import ModelFacts
from headrace.device.checkpoint import Checkpoint

_KINDS = (".gguf", ".safetensors", ".json", ".jinja")


def facts_of(checkpoint: Checkpoint, path: Path) -> ModelFacts:
    """`path` is what was opened."""
    tensors, words = checkpoint.tensors, checkpoint.vocabulary
    return ModelFacts(
        checkpoint.name,
        family=str(checkpoint.config.get("model_type", "unknown")),
        parameters=sum(prod(tensors.shape(stored)) for stored in tensors.names()),
        file_bytes=checkpoint.file_bytes,
        format="gguf" if type(tensors).__name__ == "GGUFTensors" else "safetensors",
        tokenizer_json=words.tokenizer_json,
        chat_template=words.chat_template,
        bos_token=words.bos_token,
        eos_token=words.eos_token,
        eos_token_ids=words.eos_token_ids,
        add_bos=words.add_bos,
        files=files_of(path),
    )


def files_of(path: Path) -> tuple[tuple[str, int, int], ...]:
    """(path, bytes, when changed in ns) of every file that a model is made of."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in _KINDS and file.is_file()]
    stats = [(file, file.stat()) for file in files]
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)
