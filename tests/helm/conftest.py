"""Each variant of the chart, rendered once, and an API server for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from tests.helm.api_server import Cluster, running_cluster
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real API server with the custom resources and the namespaces of the zones."""
    with running_cluster(tmp_path_factory.mktemp("kubernetes")) as made:
        yield made
