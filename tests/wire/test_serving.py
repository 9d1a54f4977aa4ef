"""How a model may be served: what goes together, and what is refused rather than ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from anamorph.wire.admin import Autoscaling, ModelCreate, Serving
from anamorph.wire.serving import app_name, deployment_name, pool_name

SHARED = {"placement": "shared", "pool": "small"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        SHARED,
        {**SHARED, "weight": 2.5, "tokens_per_s": 100.0, "max_concurrent": 4},
        {"tensor_parallel": 2, "pipeline_parallel": 2, "num_gpus": 1},
        {"tensor_parallel": 2, "autoscaling": {"min_replicas": 0}},
        {"autoscaling": {"min_replicas": 2, "max_replicas": 5, "idle_s": 1}},
    ],
)
def test_what_can_be_served_is_accepted(fields: dict[str, Any]) -> None:
    """And reads back from its JSON as it was, as the key service keeps it."""
    serving = Serving.model_validate(fields)
    assert Serving.model_validate_json(serving.model_dump_json()) == serving


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"placement": "shared"}, "pool"),
        ({**SHARED, "tensor_parallel": 2}, "tensor_parallel"),
        ({**SHARED, "pipeline_parallel": 2}, "pipeline_parallel"),
        ({**SHARED, "autoscaling": {"min_replicas": 0}}, "autoscaling"),
        ({"pool": "small"}, "shared"),
        ({"weight": 2.0}, "shared"),
        ({"tokens_per_s": 2.0}, "shared"),
        ({"autoscaling": {"min_replicas": 2, "max_replicas": 1}}, "max_replicas"),
        ({"autoscaling": {"max_replicas": 0}}, "max_replicas"),
        ({"autoscaling": {"idle_s": 0}}, "idle_s"),
        ({"autoscaling": {"idle_s": float("inf")}}, "idle_s"),
        ({"num_gpus": float("nan")}, "num_gpus"),
        ({"placement": "elsewhere"}, "placement"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"pool": "UPPER", "placement": "shared"}, "pool"),
        ({"replicas": 2}, "replicas"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], word: str) -> None:
    """Nothing is silently ignored: the message names what is wrong."""
    with pytest.raises(ValidationError, match=word):
        ModelCreate.model_validate(
            {"id": "m", "base": "b", "vocab_size": 9, "context_length": 9, "serving": fields}
        )


def test_only_one_replica_at_all_times_has_a_route_of_its_own() -> None:
    """What sleeps must not be woken by anybody, and of several a reading would meet one at random."""
    assert Autoscaling().single
    assert not Autoscaling(min_replicas=0).single
    assert not Autoscaling(max_replicas=2).single


def test_names_of_versions_and_pools_never_meet() -> None:
    """Also for a tenant that is called as pools are."""
    assert pool_name("v1") != app_name("shared", "v1", 1)
    assert deployment_name(pool_name("small")) == "pool"
    assert deployment_name(app_name("shared", "small", 1)) == "engine"
