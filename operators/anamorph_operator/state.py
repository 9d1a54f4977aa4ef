"""What is wanted (from the key service) and what is there (jobs, Ray, probes).

Both are plain values: ``plan`` compares them and nothing else, so every decision
of the operator can be tested without a process, a network or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from anamorph.wire.admin import Dtype, Engine, KeyVersionRead, ModelRead, PublicKey
from anamorph.wire.serving import DoorState, EngineSettings, KeyState, Usage, app_name, route_prefix


@dataclass(frozen=True, order=True)
class Ref:
    """One key version; version 0 of tenant ``plaintext`` is a baseline."""

    tenant: str
    model: str
    version: int

    @classmethod
    def of(cls, version: KeyVersionRead) -> Ref:
        return cls(version.tenant, version.model, version.version)

    @property
    def app(self) -> str:
        """Name of its Ray Serve application."""
        return app_name(self.tenant, self.model, self.version)

    @property
    def route(self) -> str:
        """Path it is served under, without a trailing slash."""
        return route_prefix(self.tenant, self.model, self.version)


@dataclass(frozen=True)
class Baseline:
    """A plaintext model served beside the replicas, for measurements only."""

    model: str
    folder: str
    context_length: int
    engine: Engine = "torch"
    dtype: Dtype = "auto"

    @property
    def ref(self) -> Ref:
        return Ref("plaintext", self.model, 0)


@dataclass(frozen=True)
class Desired:
    """The key service's records, and what the operator was started with.

    Args:
        allow_base: prefixes of URLs or folders that base checkpoints may come from.
        serve_url: ``http://host:port`` where Ray Serve listens.
    """

    versions: tuple[KeyVersionRead, ...]
    models: tuple[ModelRead, ...]
    jwks: tuple[PublicKey, ...]
    serve_url: str
    baselines: tuple[Baseline, ...] = ()
    allow_base: tuple[str, ...] = ()
    otlp_endpoint: str | None = None

    def model_of(self, ref: Ref) -> ModelRead | None:
        """The model record of a version; ``None`` if it is not there (yet)."""
        found = (m for m in self.models if (m.tenant, m.id) == (ref.tenant, ref.model))
        return next(found, None)


class AppStatus(StrEnum):
    """Ray Serve's own words."""

    NOT_STARTED = "NOT_STARTED"
    DEPLOYING = "DEPLOYING"
    DEPLOY_FAILED = "DEPLOY_FAILED"
    RUNNING = "RUNNING"
    UNHEALTHY = "UNHEALTHY"
    DELETING = "DELETING"


@dataclass(frozen=True)
class Application:
    """One Ray Serve application as we write it; ``settings`` is ``None`` for the door."""

    name: str
    route: str
    settings: EngineSettings | None
    state: KeyState | DoorState


@dataclass(frozen=True)
class Deployed:
    """One application as Ray reports it; ``application`` is ``None`` if it is not of our making."""

    name: str
    status: AppStatus
    application: Application | None
    deployed_at: datetime
    message: str = ""


@dataclass(frozen=True)
class Job:
    """Materialisation of one version, as far as this operator process has seen it."""

    running: bool
    attempts: int
    exit_code: int | None = None
    ended_at: datetime | None = None


class Outcome(StrEnum):
    RUNNING = "running"
    EQUAL = "equal"
    DIFFERENT = "different"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Check:
    """The latest probe of a served replica against what materialisation expected."""

    outcome: Outcome
    attempts: int
    at: datetime


@dataclass(frozen=True)
class Observed:
    """What stands on this machine or cluster now.

    ``deployed`` is ``None`` while Ray cannot be reached: then nothing is concluded
    from an application's absence.
    """

    deployed: Mapping[str, Deployed] | None
    jobs: Mapping[Ref, Job] = field(default_factory=dict)
    checks: Mapping[Ref, Check] = field(default_factory=dict)
    usage: Mapping[Ref, Usage] = field(default_factory=dict)
    reported: Mapping[Ref, Usage] = field(default_factory=dict)
    deleted: frozenset[Ref] = frozenset()

    def app(self, ref: Ref) -> Deployed | None:
        return None if self.deployed is None else self.deployed.get(ref.app)

    def running(self, ref: Ref) -> bool:
        """Whether the version's application is up and answering."""
        app = self.app(ref)
        return app is not None and app.status is AppStatus.RUNNING
