"""Each variant of the chart, rendered once."""

from __future__ import annotations

from functools import cache

import pytest
from tests.helm.chart import VARIANTS, Object, rendered


@cache
def _once(variant: str) -> list[Object]:
    return rendered(variant)


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def objects(variant: str) -> list[Object]:
    """Every object of a variant."""
    return _once(variant)
