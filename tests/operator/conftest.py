"""Builders of key-service records and of what Ray reports, for the operator's tests."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from anamorph.wire.admin import KeyVersionRead, Materialized, ModelRead, Probe, PublicKey, RotationPolicy
from anamorph.wire.states import State
from anamorph_operator.state import Desired, Observed, Ref

T0 = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = RotationPolicy(
    grace_s=20,
    client_cache_ttl_s=5,
    longest_request_s=10,
    clock_skew_s=0,
    propagation_s=5,
    destroy_delay_s=60,
)


@pytest.fixture
def now() -> datetime:
    return T0


@pytest.fixture
def model() -> ModelRead:
    return ModelRead(
        id="smol",
        tenant="acme",
        base="/bases/smol",
        engine="fake",
        vocab_size=100,
        context_length=64,
        policy=POLICY,
        created_at=T0,
    )


@pytest.fixture
def artifact() -> Callable[[int], Materialized]:
    def build(version: int) -> Materialized:
        return Materialized(
            replica=f"file:///store/acme/smol/v{version}",
            manifest_sha256=f"{version:064x}",
            probe=Probe(prompts=((1, 2),), expected=((3, 4),)),
        )

    return build


@pytest.fixture
def version(artifact: Callable[[int], Materialized]) -> Callable[..., KeyVersionRead]:
    def build(number: int, state: State, **fields: Any) -> KeyVersionRead:
        without = {State.PENDING, State.MATERIALIZING}
        defaults: dict[str, Any] = {
            "tenant": "acme",
            "model": "smol",
            "version": number,
            "state": state,
            "key_id": f"acme.smol.v{number}.{number:016x}",
            "kcv": f"{number:016x}",
            "vocab_kcv": f"{number:016x}",
            "public_key": "A" * 43 + "=",
            "row_version": 1,
            "created_at": T0,
            "updated_at": T0,
            "artifact": None if state in without else artifact(number),
        }
        return KeyVersionRead(**(defaults | fields))

    return build


@pytest.fixture
def desired(model: ModelRead) -> Callable[..., Desired]:
    def build(*versions: KeyVersionRead, **fields: Any) -> Desired:
        defaults: dict[str, Any] = {
            "models": (model,),
            "jwks": (PublicKey(kid="k1", x="x1"),),
            "serve_url": "http://127.0.0.1:8000",
            "allow_base": ("/bases",),
        }
        return Desired(versions=versions, **(defaults | fields))

    return build


@pytest.fixture
def later() -> Callable[[float], datetime]:
    return lambda seconds: T0 + timedelta(seconds=seconds)


@pytest.fixture
def empty() -> Observed:
    return Observed(deployed={})


@pytest.fixture
def ref() -> Callable[[int], Ref]:
    return lambda number: Ref("acme", "smol", number)
