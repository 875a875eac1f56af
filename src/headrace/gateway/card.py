"""What the server may tell about a model it serves: numbers for listings, no path of this machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    family: str = "unknown"
    parameters: int = 0
    weights_bytes: int = 0
    format: str = "safetensors"  # or "gguf"
    quantization: str = "unknown"
    context_tokens: int = 0
    embedding_dimensions: int = 0  # not 0: it makes vectors and does not write
    template: str = ""
    loaded_s: float = 0.0  # wall time

    @property
    def digest(self) -> str:
        """Tells models apart; not a checksum of their files, which would have to be read for it."""
        return hashlib.sha256(f"{self.name}\0{self.weights_bytes}\0{self.parameters}".encode()).hexdigest()

    @property
    def size(self) -> str:
        """Parameters as people say it: 135M, 7.2B."""
        if self.parameters >= 10**9:
            return f"{self.parameters / 1e9:.1f}B"
        return f"{self.parameters / 1e6:.0f}M"
