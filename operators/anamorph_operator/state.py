"""What is wanted (from the key service) and what is there (jobs, Ray, probes).

Both are plain values: ``plan`` compares them and nothing else, so every decision
of the operator can be tested without a process, a network or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from anamorph.serve.cluster.placement import Node
from anamorph.serve.cluster.sizing import Size
from anamorph.wire.admin import Dtype, Engine, KeyVersionRead, ModelRead, ModelSettings, PublicKey
from anamorph.wire.serving import (
    Cache,
    DoorState,
    EngineSettings,
    KeyState,
    PoolMember,
    PoolSettings,
    PoolState,
    Usage,
    app_name,
    pool_name,
    route_prefix,
)


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

    def served_by(self, model: ModelRead) -> str:
        """Name of the application that serves it: its own, or its model's pool."""
        pool = model.serving.pool
        return self.app if pool is None else pool_name(pool)


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
        versions: those that may still have to be acted on. A version of a known model that is
            not among them, up to the model's last one, has ended and nothing of it stands.
        allow_base: prefixes of URLs or folders that base checkpoints may come from.
        serve_url: ``http://host:port`` where Ray Serve listens, as seen from here.
        public_url: the same as clients see it; ``serve_url`` if absent.
        pools: for each pool, those of its ``PoolSettings`` that its members do not decide.
    """

    versions: tuple[KeyVersionRead, ...]
    models: tuple[ModelRead, ...]
    jwks: tuple[PublicKey, ...]
    serve_url: str
    baselines: tuple[Baseline, ...] = ()
    allow_base: tuple[str, ...] = ()
    otlp_endpoint: str | None = None
    pools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cache: Cache | None = None
    public_url: str | None = None

    def model_of(self, ref: Ref) -> ModelRead | None:
        """The model record that a version was issued under; ``None`` if it is not there (yet).

        A record that has changed since is for the versions to come: what stands is never moved or replaced.
        """
        model = self._models.get((ref.tenant, ref.model))
        settings = self._settings.get(ref)
        return model if model is None or settings is None else model.model_copy(update=dict(settings))

    @cached_property
    def _models(self) -> dict[tuple[str, str], ModelRead]:
        return {(model.tenant, model.id): model for model in self.models}

    @cached_property
    def _settings(self) -> dict[Ref, ModelSettings]:
        return {Ref.of(one): one.settings for one in self.versions if one.settings is not None}


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
    """One Ray Serve application as we write it.

    ``settings`` is ``None`` for the door; ``route`` is ``None`` for what only the door reaches.
    """

    name: str
    route: str | None
    settings: EngineSettings | PoolSettings | None
    state: KeyState | PoolState | DoorState

    def member(self, ref: Ref) -> PoolMember | None:
        """A version's entry in a pool."""
        members = self.state.members if isinstance(self.state, PoolState) else ()
        return next((m for m in members if Ref(m.tenant, m.model, m.version) == ref), None)


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
    REFUSED = "refused"


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
    from an application's absence. ``cluster`` is ``None`` while its nodes are not known, and
    ``sizes`` holds bases whose size is, by base and type.
    """

    deployed: Mapping[str, Deployed] | None
    jobs: Mapping[Ref, Job] = field(default_factory=dict)
    checks: Mapping[Ref, Check] = field(default_factory=dict)
    usage: Mapping[Ref, Usage] = field(default_factory=dict)
    reported: Mapping[Ref, Usage] = field(default_factory=dict)
    deleted: frozenset[Ref] = frozenset()
    cluster: tuple[Node, ...] | None = None
    sizes: Mapping[tuple[str, str], Size] = field(default_factory=dict)

    def app(self, ref: Ref, model: ModelRead | None = None) -> Deployed | None:
        """The application that serves a version: its own, or the pool that it is a member of."""
        if self.deployed is None:
            return None
        if model is None or model.serving.pool is None:
            return self.deployed.get(ref.app)
        pool = self.deployed.get(ref.served_by(model))
        standing = pool.application if pool is not None else None
        return pool if standing is not None and standing.member(ref) is not None else None

    def running(self, ref: Ref, model: ModelRead | None = None) -> bool:
        """Whether the version's application is up and answering."""
        app = self.app(ref, model)
        return app is not None and app.status is AppStatus.RUNNING
