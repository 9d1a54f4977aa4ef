"""The loop: look, decide (``plan``), do; then again.

It remembers nothing that it could not lose: everything is read from the key service, from
Ray and from whoever runs the jobs. While one of them does not answer, the others' state
stays as it is. Where jobs run and how Ray is written to is passed in (``ports``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from traceback import format_tb
from typing import Any

from anamorph import errors
from anamorph.replica import Store
from anamorph.serve.cluster.placement import Node
from anamorph.serve.cluster.sizing import Size, read_size
from anamorph.wire.admin import Activation, Address, Dtype, Failure, KeyVersionRead, ModelRead, UsageReport
from anamorph.wire.keyservice import AsyncKeyService
from anamorph.wire.serving import Cache, Usage
from anamorph.wire.states import GONE, State
from anamorph_operator import actions as act
from anamorph_operator import listing
from anamorph_operator.begin import Limits, allowed
from anamorph_operator.plan import plan
from anamorph_operator.ports import Jobs, Serve
from anamorph_operator.probe import Prober
from anamorph_operator.state import AppStatus, Baseline, Deployed, Desired, Observed, Ref

_log = logging.getLogger(__name__)

Select = Callable[
    [tuple[ModelRead, ...], tuple[KeyVersionRead, ...]],
    tuple[tuple[ModelRead, ...], tuple[KeyVersionRead, ...]],
]
"""Which of all models and versions are one reconciler's to keep."""


def everything(
    models: tuple[ModelRead, ...], versions: tuple[KeyVersionRead, ...]
) -> tuple[tuple[ModelRead, ...], tuple[KeyVersionRead, ...]]:
    """All of them: there is one Ray cluster."""
    return models, versions


# Versions whose requests in flight decide what happens next are read at every turn.
_CLOSELY = GONE | {State.DRAINING, State.FAILED}


@dataclass(frozen=True)
class Settings:
    """What one reconciler keeps in step, and how.

    Args:
        serve_url: ``http://host:port`` where Ray Serve listens, as seen from here.
        public_url: the same as clients see it; ``serve_url`` if absent.
        store: folder or URL where replicas are published.
        interval_s: seconds between two turns.
        usage_interval_s: seconds between two readings of usage and of the cluster's nodes.
    """

    serve_url: str
    store: str
    public_url: str | None = None
    baselines: tuple[Baseline, ...] = ()
    allow_base: tuple[str, ...] = ()
    interval_s: float = 1.0
    usage_interval_s: float = 5.0
    otlp_endpoint: str | None = None
    pools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cache: Cache | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Turn:
    """What the last turn saw, what it decided, and what of that failed, with the reason."""

    desired: Desired
    observed: Observed
    decided: tuple[act.Action, ...]
    failed: tuple[tuple[act.Action, str], ...]


class Reconciler:
    """Reads both worlds, plans, and carries the plan out.

    Args:
        wake: ends the pause between two turns.

    Attributes:
        last: the latest turn that came to its end; ``None`` before the first.
    """

    def __init__(
        self,
        settings: Settings,
        keys: AsyncKeyService,
        serve: Serve,
        jobs: Jobs,
        prober: Prober,
        now: Callable[[], datetime],
        select: Select = everything,
        wake: asyncio.Event | None = None,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._serve = serve
        self._jobs = jobs
        self._prober = prober
        self._now = now
        self._select = select
        self._store = Store(settings.store)
        self._deleted: set[Ref] = set()
        self._usage: dict[Ref, Usage] = {}
        self._usage_at: datetime | None = None
        self._reported: dict[Ref, Usage] = {}
        self._cluster: tuple[Node, ...] | None = None
        self._known_sizes: dict[tuple[str, Dtype], Size | None] = {}
        self._said: dict[str, str] = {}
        self._wake = asyncio.Event() if wake is None else wake
        self.last: Turn | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Turn after turn until ``stop``; then end the jobs."""
        failures = 0
        try:
            while not stop.is_set():
                failures = 0 if await self._guarded_turn() else failures + 1
                pause = min(self._settings.interval_s * 2 ** min(failures, 8), 10.0)
                await _wait(stop, self._wake, pause if failures else self._settings.interval_s)
        finally:
            await self._jobs.close()
            await self._prober.close()

    async def turn(self) -> list[act.Action]:
        """Look, decide and do once; return what was decided.

        Raises:
            ServiceError: the key service does not answer: nothing was done.
        """
        # Jobs before versions: one that ended after staging must be seen as staged.
        jobs, checks = await self._jobs.observe(), self._prober.observe()
        desired = await self._desired()
        deployed = await self._deployed()
        ended = await listing.standing_versions(self._keys, desired.versions, deployed or {})
        desired = replace(desired, versions=desired.versions + ended)
        await self._read_usage(desired, deployed or {})
        observed = Observed(
            deployed=deployed,
            jobs=jobs,
            checks=checks,
            usage=dict(self._usage),
            reported=dict(self._reported),
            deleted=frozenset(self._deleted),
            cluster=self._cluster,
            sizes=await self._sizes(desired),
        )
        decided = plan(desired, observed, self._now(), self._settings.limits)
        done = [(action, await self._do(action)) for action in decided]
        failed = tuple((action, why) for action, why in done if why is not None)
        self.last = Turn(desired, observed, tuple(decided), failed)
        return decided

    async def _guarded_turn(self) -> bool:
        try:
            await self.turn()
        except errors.AnamorphError as error:
            self._say("turn", f"waiting: {error}")
            return False
        except Exception as error:  # noqa: BLE001 - the loop must outlive a bug in one turn
            # Without its text: an unforeseen exception may quote anything.
            _log.error(
                "this turn failed: %s\n%s", type(error).__name__, "".join(format_tb(error.__traceback__))
            )
            return False
        self._say("turn", "")
        return True

    async def _desired(self) -> Desired:
        # Models first: a version up to the last one that is not listed afterwards has ended.
        every = await listing.all_models(self._keys)
        models, versions = self._select(every, await listing.current_versions(self._keys))
        return Desired(
            versions=versions,
            models=models,
            jwks=(await self._keys.inference_keys()).keys,
            serve_url=self._settings.serve_url,
            public_url=self._settings.public_url,
            baselines=self._settings.baselines,
            allow_base=self._settings.allow_base,
            otlp_endpoint=self._settings.otlp_endpoint,
            pools=self._settings.pools,
            cache=self._settings.cache,
        )

    async def _deployed(self) -> dict[str, Deployed] | None:
        try:
            deployed = await self._serve.read()
        except errors.Unavailable as error:
            self._say("ray", f"waiting: {error}")
            return None
        self._say("ray", "")
        for name, app in deployed.items():
            failed = app.status in {AppStatus.DEPLOY_FAILED, AppStatus.UNHEALTHY}
            self._say(name, f"{name} is {app.status}: {app.message[-800:]}" if failed else "")
        return deployed

    async def _read_usage(self, desired: Desired, deployed: dict[str, Deployed]) -> None:
        now = self._now()
        there = Observed(deployed)
        refs = {Ref.of(version): version for version in desired.versions}
        served = {ref: v for ref, v in refs.items() if there.running(ref, desired.model_of(ref))}
        closely = {ref for ref, version in served.items() if version.state in _CLOSELY}
        due = (
            self._usage_at is None
            or (now - self._usage_at).total_seconds() >= self._settings.usage_interval_s
        )
        asked = set(served) if due else closely
        if due:
            self._usage_at = now
            await self._read_cluster()
        kept = {ref: usage for ref, usage in self._usage.items() if ref in served.keys() - asked}
        self._usage = kept | await self._prober.usage(self._settings.serve_url, sorted(asked))

    async def _read_cluster(self) -> None:
        """Nodes come and go slowly; what is not known now is as it was."""
        with suppress(errors.Unavailable):
            self._cluster = await self._serve.nodes()

    async def _sizes(self, desired: Desired) -> dict[tuple[str, str], Size]:
        """Sizes of bases that lie in a folder here; each is looked at once."""
        found: dict[tuple[str, str], Size] = {}
        for model in filter(None, (desired.model_of(Ref.of(version)) for version in desired.versions)):
            place = (model.base, model.dtype)
            if place not in self._known_sizes and allowed(model.base, desired.allow_base):
                self._known_sizes[place] = await asyncio.to_thread(_size_of, model.base, model.dtype)
            if (known := self._known_sizes.get(place)) is not None:
                found[place] = known
        return found

    async def _do(self, action: act.Action) -> str | None:
        """Carry one action out; a failure is told, returned and left to the next turn."""
        what = _describe(action)
        if isinstance(action, act.Hold):
            self._say(f"hold {action.ref.app}", f"{action.ref.app} waits for room: {action.reason}")
            return None
        try:
            await self._perform(action)
        except (errors.AnamorphError, OSError) as error:
            self._say(what, f"{what}: {error}")
            return str(error)
        if not isinstance(action, act.ReportUsage):
            _log.info("%s", what)
        self._said.pop(what, None)
        return None

    async def _perform(self, action: act.Action) -> None:
        doers: dict[type[Any], Callable[[Any], Awaitable[Any]]] = {
            act.StartJob: lambda a: self._jobs.start(a.ref, a.model),
            act.StopJob: lambda a: self._jobs.stop(a.ref),
            act.FailVersion: lambda a: self._keys.fail(*_place(a.ref), Failure(reason=a.reason)),
            act.Apply: lambda a: self._serve.write(a.applications),
            act.Verify: self._verify,
            act.Activate: lambda a: self._keys.activate(*_place(a.ref), Activation(endpoint=a.endpoint)),
            act.Readdress: lambda a: self._keys.readdress(*_place(a.ref), Address(endpoint=a.endpoint)),
            act.Retire: lambda a: self._keys.retire(*_place(a.ref)),
            act.DeleteReplica: self._delete_replica,
            act.Destroyed: lambda a: self._keys.destroyed(*_place(a.ref)),
            act.ReportUsage: self._report_usage,
        }
        await doers[type(action)](action)

    async def _verify(self, action: act.Verify) -> None:
        self._prober.start(action)

    async def _delete_replica(self, action: act.DeleteReplica) -> None:
        prefix = self._store.url + "/"
        if not action.url.startswith(prefix):
            raise errors.ReplicaError("this replica lies outside the operator's store; delete it by hand")
        await asyncio.to_thread(self._store.delete, action.url.removeprefix(prefix))
        self._deleted.add(action.ref)

    async def _report_usage(self, action: act.ReportUsage) -> None:
        report = UsageReport(source=action.usage.source, tokens=action.usage.tokens)
        await self._keys.report_usage(*_place(action.ref), report)
        self._reported[action.ref] = action.usage

    def _say(self, about: str, text: str) -> None:
        """Log a standing condition once, not at every turn."""
        if text and self._said.get(about) != text:
            _log.warning("%s", text)
        self._said[about] = text


def _size_of(base: str, dtype: Dtype) -> Size | None:
    elsewhere = "://" in base and not base.startswith("file://")
    return None if elsewhere else read_size(Path(base.removeprefix("file://")), dtype)


def _place(ref: Ref) -> tuple[str, str, int]:
    return ref.tenant, ref.model, ref.version


def _describe(action: act.Action) -> str:
    if isinstance(action, act.Apply):
        return "apply " + " ".join(application.name for application in action.applications)
    why = f" ({action.reason})" if isinstance(action, act.FailVersion) else ""
    return f"{type(action).__name__} {action.ref.app}{why}"


async def _wait(stop: asyncio.Event, wake: asyncio.Event, seconds: float) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in (stop, wake)]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    wake.clear()
