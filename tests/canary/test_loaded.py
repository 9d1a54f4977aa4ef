from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from anamorph.canary import Baselines, loaded
from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.states import State

NOW = datetime(2026, 11, 22, tzinfo=UTC)
BASELINES = Baselines("http://serve:8000/")


def version(**changes: Any) -> KeyVersionRead:
    fields = {
        "tenant": "acme",
        "model": "smol",
        "version": 3,
        "state": State.ACTIVE,
        "key_id": "acme.smol.v3.0123456789abcdef",
        "row_version": 1,
        "created_at": NOW,
        "updated_at": NOW,
        "endpoint": "http://serve:8000/acme/smol/v3",
    }
    return KeyVersionRead.model_validate(fields | changes)


def model(**changes: Any) -> ModelRead:
    fields = {
        "tenant": "acme",
        "id": "smol",
        "base": "/models/base",
        "vocab_size": 400,
        "context_length": 512,
        "created_at": NOW,
    }
    return ModelRead.model_validate(fields | changes)


def test_what_is_always_loaded() -> None:
    """A dedicated model with a replica that stays is measured against the baseline of its name."""
    (served,), left_out = loaded([version()], [model()], BASELINES)
    assert (served.key_id, served.endpoint) == (version().key_id, version().endpoint)
    assert served.plaintext == "http://serve:8000/plaintext/smol/v0"
    assert not left_out


def test_a_baseline_of_another_name() -> None:
    """Such as the twin that several models of one private base share."""
    baselines = Baselines("http://serve:8000", {"smol": "twin"})
    (served,), _ = loaded([version()], [model()], baselines)
    assert (served.baseline, served.plaintext) == ("twin", "http://serve:8000/plaintext/twin/v0")


@pytest.mark.parametrize(
    ("serving", "reason"),
    [
        ({"autoscaling": {"min_replicas": 0, "max_replicas": 2}}, "scales_to_zero"),
        ({"placement": "shared", "pool": "p"}, "shared"),
    ],
)
def test_what_a_request_would_wake_or_hold(serving: dict[str, Any], reason: str) -> None:
    """A model that may leave its device, or its slot, is left out, and counted by the reason."""
    found, left_out = loaded([version()], [model(serving=serving)], BASELINES)
    assert found == []
    assert left_out == {reason: 1}


@pytest.mark.parametrize("state", [state for state in State if state is not State.ACTIVE])
def test_other_states(state: State) -> None:
    """Only what serves: a draining version ends when nothing is in flight."""
    assert loaded([version(state=state)], [model()], BASELINES) == ([], {})


def test_without_an_endpoint() -> None:
    """There is nothing to send a request to."""
    found, left_out = loaded([version(endpoint=None)], [model()], BASELINES)
    assert (found, left_out) == ([], {"no_endpoint": 1})


def test_of_a_model_that_is_not_listed() -> None:
    """Created between the two lists: its turn comes at the next look."""
    assert loaded([version()], [model(id="other")], BASELINES) == ([], {})
