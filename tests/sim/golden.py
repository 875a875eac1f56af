"""Finds the published numbers that lie beside this checkout, never inside it."""

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"


def golden(name: str) -> Any:
    """The parsed file, or a skip with the reason."""
    if not FOLDER.is_dir():
        pytest.skip(
            f"the published numbers are not beside this checkout ({FOLDER} is missing)", allow_module_level=True
        )
    return json.loads((FOLDER / name).read_text())
