from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "anamorph": ROOT / "platform" / "anamorph",
    "anamorph_keysvc": ROOT / "keysvc" / "anamorph_keysvc",
    "anamorph_operator": ROOT / "operators" / "anamorph_operator",
}


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, Path]:
    return SOURCES


@pytest.fixture(scope="session")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
