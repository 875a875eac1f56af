"""Names of models and the folders they live in: `home/models/ORG--NAME[--FILE.gguf]`.

A name becomes a path only here, and only through a pattern that has no room for separators, dots that climb, NUL or
reserved words. Each folder has a record of where its files came from and of what they hold, which `verify` compares;
folders appear complete or not at all.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from headrace.core.types import HeadraceError
from headrace.device.checkpoint import RECORD
from headrace.device.modelfile import BadModelFile, read_object

_SEGMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,180}\.gguf")
_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")
_PARTIAL = ".partial"
_MAX_FOLDER_CHARS = 240  # file systems take 255 bytes


class BadName(HeadraceError):
    """A model name that is none of the forms Headrace knows."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of a hub, or one GGUF file of it."""

    org: str
    name: str
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `ORG/NAME` or `ORG/NAME:FILE.gguf`. Raises BadName for anything else."""
        repository, colon, file = text.partition(":")
        parts = repository.split("/")
        if len(parts) != 2 or not all(map(_is_segment, parts)) or (colon and not _is_file(file)):
            raise BadName(f"{text!r:.120} is not a model on a hub; write ORG/NAME or ORG/NAME:FILE.gguf")
        model = cls(parts[0], parts[1], file or None)
        if len(model.folder) > _MAX_FOLDER_CHARS:
            raise BadName(f"{text!r:.120} is too long for the name of a folder")
        return model

    @property
    def repository(self) -> str:
        return f"{self.org}/{self.name}"

    def __str__(self) -> str:
        return f"{self.repository}:{self.file}" if self.file else self.repository

    @property
    def folder(self) -> str:
        """One path component. Segments have no `--`, so different ids have different folders."""
        return "--".join(part for part in (self.org, self.name, self.file) if part)


@dataclass(frozen=True, slots=True)
class Record:
    """Written beside a pulled model."""

    source: str  # the id it was pulled as
    revision: str  # commit of the repository
    crc32: Mapping[str, int] = field(default_factory=dict)  # of every file when it was pulled

    @classmethod
    def read(cls, folder: Path) -> Self:
        stored = read_object(folder / RECORD)
        source, revision = stored.get("source"), stored.get("revision")
        if not isinstance(source, str) or not isinstance(revision, str):
            raise BadModelFile(f"{folder / RECORD} does not say where the model came from; pull it again")
        sums = stored.get("crc32", {})
        if not isinstance(sums, dict) or not all(_is_name(name) and type(crc) is int for name, crc in sums.items()):
            raise BadModelFile(f"{folder / RECORD} does not say what the files of the model hold; pull it again")
        return cls(source, revision, sums)

    def write(self, folder: Path) -> None:
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def verify(folder: Path) -> Path:
    """The folder of a pulled model, if its files are what was pulled. Reads them once; raises BadModelFile.

    A checksum and no digest: it finds what a disk or an interrupted copy did, not what somebody did on purpose."""
    record = Record.read(folder)
    for name, expected in record.crc32.items():
        try:
            same = crc32(folder / name) == expected
        except OSError as error:
            raise BadModelFile(f"{folder / name} cannot be read: {error.strerror}; {_again(record)}") from error
        if not same:
            raise BadModelFile(f"{folder / name} is damaged: it is not what was pulled; {_again(record)}")
    return folder


def _again(record: Record) -> str:
    return f"get it again with: headrace pull {record.source}"


def crc32(path: Path) -> int:
    """Of a file's content."""
    found = 0
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            found = zlib.crc32(chunk, found)
    return found


def place(home: Path, model: HubId) -> Path:
    """Where a model lives once it is complete."""
    return home / "models" / model.folder


def partial(home: Path, model: HubId) -> Path:
    """Where it is being put together."""
    return home / "models" / _PARTIAL / model.folder


def pulled(home: Path) -> Iterator[Path]:
    """Folders of complete models, sorted by name."""
    yield from _folders(home / "models")


def unfinished(home: Path) -> Iterator[Path]:
    """Folders of downloads that were interrupted."""
    yield from _folders(home / "models" / _PARTIAL)


def contained(path: Path) -> bool:
    """True for a folder that lies where it seems to: not a link to somewhere else."""
    return path.is_dir() and not path.is_symlink()


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_segment(text: str) -> bool:
    return bool(_SEGMENT.fullmatch(text)) and not _RESERVED.fullmatch(text) and ".." not in text and "--" not in text


def _is_name(text: object) -> bool:
    """Of a file in a folder itself."""
    return isinstance(text, str) and Path(text).name == text and text not in ("", "..")


def _is_file(text: str) -> bool:
    return bool(_FILE.fullmatch(text)) and not _RESERVED.fullmatch(text) and ".." not in text
