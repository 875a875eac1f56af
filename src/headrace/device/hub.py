"""Pulls models from a Hugging Face hub: only files that Headrace reads, verified, and visible only when complete.

    ask for the file list -> choose -> check space -> download -> verify checksums -> record -> rename

Bytes travel through huggingface_hub, which knows endpoints, tokens and mirrors, and continues after a dropped
connection. A pull that failed keeps its whole files for the next one. This room decides what is fetched and when a
folder counts as a model. Nothing that is fetched is executed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from headrace.core.config import format_bytes
from headrace.core.types import HeadraceError
from headrace.device import store
from headrace.device.folder import read_config
from headrace.device.modelfile import BadModelFile
from headrace.device.store import HubId, Record
from headrace.device.weights import INDEX, SINGLE

Progress = Callable[[str], None]

_SMALL_FILES = (  # in the order of fetching: the config first, as it may end the matter
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SHARD = re.compile(r"[A-Za-z0-9._-]{1,100}-\d{5}-of-\d{5}\.safetensors")
_SPARE_BYTES = 64 << 20  # left free on the disk


class PullFailed(HeadraceError):
    """A model could not be fetched; the message says why. Files that arrived whole are kept for the next pull."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the hub describes it. LFS files have a SHA-256, others a git object id."""

    name: str
    nbytes: int
    sha256: str | None
    git_sha1: str | None


def pull(text: str, home: Path, progress: Progress, endpoint: str | None = None) -> Path:
    """Fetch `ORG/NAME[:FILE.gguf]` into the store and return its folder. Raises BadName, PullFailed, BadModelFile.

    A model that is already there at the hub's current revision, and undamaged, is left alone.
    """
    model = HubId.parse(text)
    progress(f"ask the hub for {model.repository}")
    revision, listed = _list(model, endpoint)
    final, partial = store.place(home, model), store.partial(home, model)
    if store.contained(final) and _revision(final) == revision:
        progress(f"{model} is up to date")
        return final
    files = choose(model, listed)
    partial.mkdir(parents=True, exist_ok=True)
    _check_space(partial, files)
    for number, file in enumerate(files, 1):
        progress(f"{number}/{len(files)} {file.name} ({format_bytes(file.nbytes)})")
        _download(model, file, revision, partial, endpoint)
        if file.name == "config.json":
            read_config(partial)  # an architecture we cannot run costs no gigabytes
    Record(str(model), revision, {file.name: store.crc32(partial / file.name) for file in files}).write(partial)
    _publish(partial, final)
    return final


def choose(model: HubId, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files of a repository that make up the model. Raises PullFailed with what could be asked for instead."""
    by_name = {file.name: file for file in listed}
    ggufs = sorted(name for name in by_name if re.fullmatch(r"[^/\\]+\.gguf", name))
    if model.file:
        if model.file not in by_name:
            raise PullFailed(f"{model.repository} has no {model.file}; it has {_some(ggufs) or 'no GGUF files'}")
        return [by_name[model.file]]
    weights = [name for name in by_name if _SHARD.fullmatch(name)] if INDEX in by_name else [SINGLE]
    if not all(name in by_name for name in weights) or not weights:
        if ggufs:
            raise PullFailed(f"{model.repository} holds GGUF files; name one, as in {model.repository}:{ggufs[0]}")
        raise PullFailed(f"{model.repository} holds neither safetensors nor GGUF files; other weights are not read")
    if missing := [name for name in ("config.json", "tokenizer.json") if name not in by_name]:
        raise PullFailed(f"{model.repository} has no {missing[0]}, so it cannot be served")
    wanted = [*_SMALL_FILES, *([INDEX] if INDEX in by_name else []), *sorted(weights)]
    return [by_name[name] for name in wanted if name in by_name]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _list(model: HubId, endpoint: str | None) -> tuple[str, list[RemoteFile]]:
    """The current commit and its files."""
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(model.repository, files_metadata=True, timeout=30)
    except Exception as error:  # the library raises those of its HTTP client, which changed between versions
        raise _explain(model, error) from error
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
        raise PullFailed(f"the hub does not name a revision of {model.repository}")
    files = []
    for sibling in info.siblings or []:
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        files.append(RemoteFile(sibling.rfilename, sibling.size or 0, sha256, sibling.blob_id))
    return info.sha, files


def _download(model: HubId, file: RemoteFile, revision: str, folder: Path, endpoint: str | None) -> None:
    """Fetch one file, unless an earlier pull did, and verify it."""
    try:
        path = huggingface_hub.hf_hub_download(
            model.repository, file.name, revision=revision, local_dir=folder, endpoint=endpoint
        )
    except Exception as error:  # as above
        raise _explain(model, error) from error
    if not _is_intact(Path(path), file):
        Path(path).unlink()
        raise PullFailed(f"{file.name} of {model.repository} arrived damaged and was removed; pull again")


def _is_intact(path: Path, file: RemoteFile) -> bool:
    """Compares with the hub's checksum: SHA-256 of the content, or git's SHA-1 of a blob."""
    if file.sha256 is None and file.git_sha1 is None:
        return path.stat().st_size == file.nbytes
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.git_sha1)


def _check_space(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Bytes that an earlier attempt already brought count as there."""
    have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    need = sum(file.nbytes for file in files) - have + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if need > free:
        raise PullFailed(
            f"the model needs {format_bytes(need)} more in {folder.parent.parent} and {format_bytes(free)} are free; "
            "make room or set HEADRACE_HOME to another disk"
        )


def _publish(partial: Path, final: Path) -> None:
    """Make a complete folder visible under its name; an older one steps aside first."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    retired = partial.with_name(f".{partial.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if final.is_symlink():
        raise PullFailed(f"{final} is a link; remove it first")
    if final.exists():
        final.rename(retired)
    partial.rename(final)
    shutil.rmtree(retired, ignore_errors=True)


def _revision(folder: Path) -> str | None:
    """None if there is no model, or not as it was pulled."""
    try:
        return Record.read(store.verify(folder)).revision
    except BadModelFile:
        return None


def _explain(model: HubId, error: Exception) -> PullFailed:
    name = model.repository
    if isinstance(error, errors.GatedRepoError):
        return PullFailed(f"{name} asks for consent first: accept its terms on the hub, then set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return PullFailed(f"the hub has no model {name}, or it is private and HF_TOKEN is not set")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return PullFailed(f"{name} cannot be fetched: HF_HUB_OFFLINE is set")
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return PullFailed(
        f"{name} could not be fetched ({reason}); check the network or HF_ENDPOINT, or serve a local path"
    )
