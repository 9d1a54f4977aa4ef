"""What settled objects cost: no write, and reads of which there are as many for one as for twenty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from benchmarks.kubernetes_objects import measure
from benchmarks.objects.stand import settle, standing

pytestmark = pytest.mark.real

OBJECTS, TURNS = 20, 4
INTERVAL_S = 0.5


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Twenty settled objects, each in a namespace of its own, over some turns of the operator."""
    folder = tmp_path_factory.mktemp("objects")
    with standing(folder, OBJECTS, INTERVAL_S, lambda *_: None) as stand:
        settle(stand, quiet_s=8, patience_s=180, step=lambda *_: None)
        result = measure(stand, 5)
        while result["turns of each cluster"] < TURNS:  # on a busy machine
            result = measure(stand, 2 * result["seconds"])
        yield result


def test_nothing_is_written(measured: dict[str, Any]) -> None:
    assert measured["written"] == []


def test_reads_of_the_api_server_are_per_turn(measured: dict[str, Any]) -> None:
    """The Jobs of a cluster; the rest is watched, and a watch begins anew now and then, not per object."""
    calls = measured["kubernetes"]["calls"]
    watches = {kind: count for kind, count in calls.items() if kind.startswith("watch ")}
    assert calls.keys() - watches.keys() == {"list jobs", "update leases"}
    assert sum(watches.values()) < OBJECTS


def test_reads_of_the_key_service_are_per_turn(measured: dict[str, Any]) -> None:
    """Lists by pages: each turn of the cluster, and of the models, asks for each of them once."""
    calls, turns = measured["key service"]["calls"], measured["turns of each cluster"]
    lists = {"GET /v1/models", "GET /v1/versions", "GET /v1/versions due", "GET /v1/inference-keys"}
    assert calls.keys() == lists
    assert abs(calls["GET /v1/inference-keys"] - turns) <= 1
    for kind in lists:
        # Two loops, neither much faster than the other.
        assert calls[kind] <= 4 * turns + 4
