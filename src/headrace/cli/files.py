"""Files that commands write: checked before minutes of work, written after."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from headrace.core.config import BadSetting


def check_writable(*paths: Path | None) -> None:
    """Raises BadSetting where a file could not be written."""
    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise BadSetting(f"cannot write {path}: there is no folder {path.parent}")


def write(path: Path | None, text: Callable[[], str]) -> None:
    """Write what `text` makes, if there is somewhere to write it, and say so."""
    if path is None:
        return
    try:
        path.write_text(text(), encoding="utf-8")
    except OSError as error:
        raise BadSetting(f"cannot write {path}: {error}") from error
    print(f"written: {path}", file=sys.stderr)
