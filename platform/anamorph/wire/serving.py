"""What the operator tells the compute zone: settings of applications, and key state.

These travel as Ray Serve application arguments and ``user_config``, which anyone
with access to the cluster can read: references and public keys only.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from anamorph.wire.admin import Dtype, Engine, Message, PublicKey
from anamorph.wire.ids import Label

Protection = Literal["plaintext", "encrypted"]

APP_IMPORT_PATH = "anamorph.serve.application:build"
DOOR_IMPORT_PATH = "anamorph.serve.door:build"


def app_name(tenant: str, model: str, version: int) -> str:
    """Name of the Ray Serve application of one key version."""
    return f"{tenant}.{model}.v{version}"


def route_prefix(tenant: str, model: str, version: int) -> str:
    """Path under which one key version is served, without a trailing slash."""
    return f"/{tenant}/{model}/v{version}"


class EngineSettings(Message):
    """Arguments of one application: one (tenant, model, version).

    The plaintext baseline is ``tenant="plaintext"``, ``version=0`` with
    ``protection="plaintext"``; it has no key id and no trust anchor.
    """

    tenant: str
    model: Label
    version: int = Field(ge=0)
    protection: Protection = "encrypted"
    replica: str
    key_id: str | None = None
    public_key: str | None = None
    """Trust anchor of the replica's manifest: raw Ed25519 public key, base64."""
    manifest_sha256: str | None = None
    engine: Engine = "torch"
    dtype: Dtype = "auto"
    context_length: int = Field(ge=1)
    max_batch_tokens: int = Field(default=2048, ge=16)
    num_blocks: int = Field(default=512, ge=2)
    max_concurrent: int = Field(default=16, ge=1)
    max_queued: int = Field(default=64, ge=0)
    max_body_bytes: int = Field(default=2**20, ge=1024)
    num_gpus: float = Field(default=0, ge=0)
    """What Ray reserves for the replica; with 0 it sees no GPU and computes on the CPU."""
    request_timeout_s: float = Field(default=300, gt=0)
    otlp_endpoint: str | None = None


class KeyState(Message):
    """``user_config`` of an engine application: pushed, never fetched.

    ``status`` is how the version is to be answered: ``serving`` normally,
    ``suspended`` 403, ``gone`` 410.
    """

    status: Literal["serving", "suspended", "gone"] = "serving"
    jwks: tuple[PublicKey, ...] = ()


class Route(Message):
    """One version as the door knows it."""

    tenant: str
    model: Label
    version: int
    key_id: str
    status: Literal["pending", "serving", "suspended", "gone"]


class DoorState(Message):
    """``user_config`` of the door."""

    jwks: tuple[PublicKey, ...] = ()
    routes: tuple[Route, ...] = ()


class Usage(Message):
    """Answer of an application's ``GET /usage``: tokens served since this process started.

    ``in_flight`` counts the requests that are queued or being answered now: the
    operator deletes an application only at zero.
    """

    source: str
    tokens: int = Field(ge=0)
    in_flight: int = Field(default=0, ge=0)
