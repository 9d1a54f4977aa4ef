from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anamorph.keys import TenantKey

VECTORS = Path(__file__).parents[1] / "vectors"


def read_vectors(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((VECTORS / name).read_text(encoding="utf-8"))
    return document


@pytest.fixture
def key() -> TenantKey:
    return TenantKey.from_root(bytes(range(32)), "acme", "smollm2-135m", 1)


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    return read_vectors("keys.json")


@pytest.fixture(scope="session")
def invalid() -> dict[str, Any]:
    return read_vectors("keys_invalid.json")
