"""What every reader of model files shares: the one error they raise, and bounded JSON.

A model file is input from a stranger. Whatever is wrong with it comes out as `BadModelFile`, never as a parser's own
exception, and no size it declares is believed before it is compared with the size of the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headrace.core.types import HeadraceError

MAX_JSON_BYTES = 128 << 20  # the largest tokenizer.json in use is about a quarter of this


class BadModelFile(HeadraceError):
    """A model file that is corrupt, lies about its sizes, or is of a kind Headrace cannot read."""


def read_text(path: Path, limit_bytes: int = MAX_JSON_BYTES) -> str:
    """A UTF-8 file of at most `limit_bytes`. Raises BadModelFile if it is missing, larger, or not text."""
    try:
        if not path.is_file():
            raise BadModelFile(f"{path} is missing or not a regular file")
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            data = file.read(min(size_bytes, limit_bytes) + 1)  # a buffer of the file's size, not of the limit's
    except OSError as error:
        raise BadModelFile(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise BadModelFile(f"{path} is larger than {limit_bytes} bytes, more than such a file ever needs")
    return decode(data, str(path))


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    return parse_object(read_text(path), str(path))


def parse_object(text: str, what: str) -> dict[str, Any]:
    """`text` as one JSON object. Raises BadModelFile, naming `what`, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadModelFile(f"{what} should hold a JSON object and holds a {type(value).__name__}")
    return value


def decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadModelFile(f"{what} is not valid UTF-8 at byte {error.start}") from error
