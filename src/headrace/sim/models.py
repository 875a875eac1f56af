"""Model shapes by name, from `data/models.toml`, and from any Hugging Face config.json (`sim.hfconfig`).

Owns the catalogue; knows nothing about devices or time.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from headrace.core.shape import Latent, ModelShape
from headrace.sim.hardware import unknown
from headrace.sim.hfconfig import UnreadableConfig, from_hf, windows

__all__ = ["ModelEntry", "UnreadableConfig", "from_hf", "model", "model_entry", "model_names"]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One line of the catalogue: a shape, where it was published, and what was published about its size."""

    name: str
    shape: ModelShape
    source: str
    published_weights: float  # parameters of the text model
    published_active: float | None  # parameters a token meets; None for dense models


@cache
def _catalogue() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("headrace.sim").joinpath("data/models.toml").read_text("utf-8")
    return tomllib.loads(text)


def _shape(entry: Mapping[str, Any]) -> ModelShape:
    renamed = {"tied": "tied_embedding"}
    skipped = {"source", "weights_B", "active_B", "window", "global_every", "latent"}
    fields = {renamed.get(key, key): value for key, value in entry.items() if key not in skipped}
    fields.setdefault("kv_heads", entry["heads"])
    fields.setdefault("head_dim", entry["hidden"] // entry["heads"])
    latent = Latent(**entry["latent"]) if "latent" in entry else None
    sliding = windows(entry["layers"], entry.get("window"), entry.get("global_every", 0))
    return ModelShape(**fields, windows=sliding, latent=latent)


@cache
def model_entry(name: str) -> ModelEntry:
    """The catalogue's entry of that name, in any case. Raises UnknownName listing the nearest names."""
    for known, entry in _catalogue().items():
        if known == name.lower():
            active = entry["active_B"] * 1e9 if "active_B" in entry else None
            return ModelEntry(known, _shape(entry), entry["source"], entry["weights_B"] * 1e9, active)
    raise unknown("model", name, _catalogue())


def model(name: str) -> ModelShape:
    """The shape of that name, in any case. Raises UnknownName listing the nearest names."""
    return model_entry(name).shape


def model_names() -> tuple[str, ...]:
    return tuple(_catalogue())
