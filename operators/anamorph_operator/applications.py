"""The list of Ray Serve applications as a function of what is wanted and what is there.

Rules, each of which a property test holds on to:
- the door comes first and is always there;
- a version is served from STAGED until it is gone *and* idle, by its own application or
  as a member of its pool;
- the arguments of an application that stands are never changed: a change would make
  Ray replace it in place, and for a while two keys would answer under one path;
- an application that the key service does not know is left alone: an answer from a
  restored or wrong database must not take a service down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.serving import DoorState, Ended, EngineSettings, KeyState, PoolState, Route, pool_name
from anamorph.wire.states import GONE, SERVABLE, State
from anamorph_operator import capacity, pools
from anamorph_operator.state import Application, AppStatus, Baseline, Deployed, Desired, Observed, Ref

DOOR = "door"
# How long a failed application of a version in use waits before it is deployed anew.
REDEPLOY_AFTER = timedelta(seconds=15)
# Requests of one version that the door holds, beyond those that can be computed at once.
HELD = 64
_ENDED = GONE | {State.FAILED}


def applications(desired: Desired, observed: Observed, now: datetime) -> tuple[Application, ...]:
    """Every application that should stand after the next write, door first."""
    served = [
        *(_baseline_app(desired, observed, baseline, now) for baseline in desired.baselines),
        *(_version_app(desired, observed, version, now) for version in desired.versions),
        *(_pool_app(desired, observed, pool, now) for pool in pools.sharing(desired)),
    ]
    standing = [app for app in served if app is not None]
    return _door(desired, standing), *standing, *_unknown(desired, observed)


def _door(desired: Desired, standing: list[Application]) -> Application:
    apps = {app.name: app for app in standing}
    pairs = ((version, desired.model_of(Ref.of(version))) for version in desired.versions)
    routes = tuple(_route(version, model, apps) for version, model in pairs if _routed(version, model, apps))
    state = DoorState(
        jwks=desired.jwks,
        routes=routes,
        ended=tuple(_ended(desired, routes)),
        otlp_endpoint=desired.otlp_endpoint,
    )
    return Application(DOOR, "/", None, state)


def _ended(desired: Desired, routes: Iterable[Route]) -> Iterator[Ended]:
    """For each model, up to where versions without a route have ended; nothing where all have one.

    At most one version is being prepared, and it is the last: it has not ended.
    """
    preparing = {Ref.of(v) for v in desired.versions if v.key_id is None and v.state is State.PENDING}
    routed = defaultdict(list)
    for route in routes:
        routed[route.tenant, route.model].append(route.version)
    for model in desired.models:
        last = Ref(model.tenant, model.id, model.last_version)
        up_to = last.version - (last in preparing)
        if up_to > sum(version <= up_to for version in routed[model.tenant, model.id]):
            yield Ended(tenant=model.tenant, model=model.id, up_to=up_to)


def _routed(version: KeyVersionRead, model: ModelRead | None, apps: dict[str, Application]) -> bool:
    """Whether the door has to know more of a version than that it has ended, or nothing."""
    if version.state in GONE:
        return model is not None and _app_of(Ref.of(version), model, apps) is not None
    # A version that is still being prepared has no key id, and nobody can ask for it yet.
    return version.key_id is not None and version.state is not State.FAILED


def _route(version: KeyVersionRead, model: ModelRead | None, apps: dict[str, Application]) -> Route:
    names = {State.ACTIVE: "serving", State.DRAINING: "serving", State.SUSPENDED: "suspended"}
    status = "gone" if version.state in GONE else names.get(version.state, "pending")
    forwarding = {} if model is None else _forwarding(Ref.of(version), model, apps)
    return Route.model_validate(
        {
            "tenant": version.tenant,
            "model": version.model,
            "version": version.version,
            "key_id": version.key_id,
            "status": status,
            **forwarding,
        }
    )


def _forwarding(ref: Ref, model: ModelRead, apps: dict[str, Application]) -> dict[str, object]:
    """What the door needs to forward to a version whose application has no route of its own."""
    app = _app_of(ref, model, apps)
    if app is None or app.route is not None:
        return {}
    replicas = app.settings.autoscaling.max_replicas if isinstance(app.settings, EngineSettings) else 1
    return {
        "app": app.name,
        "max_held": model.serving.max_concurrent * replicas + HELD,
        "affinity": replicas > 1,
        "request_timeout_s": model.policy.longest_request_s,
    }


def _app_of(ref: Ref, model: ModelRead, apps: dict[str, Application]) -> Application | None:
    app = apps.get(ref.served_by(model))
    outside = app is None or (model.serving.pool is not None and app.member(ref) is None)
    return None if outside else app


def _version_app(
    desired: Desired, observed: Observed, version: KeyVersionRead, now: datetime
) -> Application | None:
    ref, model = Ref.of(version), desired.model_of(Ref.of(version))
    if model is None or model.serving.pool is not None or not _served(version, model, observed, now):
        return None
    deployed = observed.app(ref)
    if _to_be_redeployed(version.state, deployed, now):
        return None
    settings = _settled(_version_settings(desired, observed, version, model), deployed)
    # Only the door wakes what has left its device, and counts over several replicas.
    route = ref.route if settings.autoscaling.single else None
    return Application(ref.app, route, settings, KeyState(status=_status(version.state), jwks=desired.jwks))


def _served(version: KeyVersionRead, model: ModelRead, observed: Observed, now: datetime) -> bool:
    """Whether a version has its application, or its place in a pool, after the next write."""
    if version.artifact is None or version.state not in SERVABLE | _ENDED:
        return False
    if version.state not in _ENDED:
        return True
    there = observed.app(Ref.of(version), model) is not None
    return there and not removable(version, model, observed, now)


def _pool_app(desired: Desired, observed: Observed, pool: str, now: datetime) -> Application | None:
    served = [(v, m) for v, m in pools.sharing(desired)[pool] if _served(v, m, observed, now)]
    deployed = (observed.deployed or {}).get(pool_name(pool))
    if not served or _to_be_redeployed(None if pools.in_use(desired, pool) else State.STAGED, deployed, now):
        return None
    settings = pools.standing(pool, observed) or pools.settings(desired, observed, pool, served)
    members = tuple(
        pools.member(version, model, _status(version.state))
        for version, model in served
        # Who is in stays in: what it was let in for is what it needs.
        if observed.app(Ref.of(version), model) is not None or pools.refusal(model, settings) is None
    )
    state = PoolState(jwks=desired.jwks, members=members)
    return Application(pool_name(pool), None, settings, state) if members else None


def _status(state: State) -> str:
    return "suspended" if state is State.SUSPENDED else "gone" if state in _ENDED else "serving"


def _version_settings(
    desired: Desired, observed: Observed, version: KeyVersionRead, model: ModelRead
) -> EngineSettings:
    assert version.artifact is not None  # noqa: S101 - _version_app has looked
    return EngineSettings.model_validate(
        {
            "tenant": version.tenant,
            "model": version.model,
            "version": version.version,
            "replica": version.artifact.replica,
            "key_id": version.key_id,
            "public_key": version.public_key,
            "manifest_sha256": version.artifact.manifest_sha256,
            **capacity.engine_fields(observed, model),
            "otlp_endpoint": desired.otlp_endpoint,
            **({} if desired.cache is None else {"cache": desired.cache}),
        }
    )


def _baseline_app(
    desired: Desired, observed: Observed, baseline: Baseline, now: datetime
) -> Application | None:
    ref = baseline.ref
    if _to_be_redeployed(None, observed.app(ref), now):
        return None
    settings = EngineSettings(
        tenant=ref.tenant,
        model=ref.model,
        version=ref.version,
        protection="plaintext",
        replica=baseline.folder,
        engine=baseline.engine,
        dtype=baseline.dtype,
        context_length=baseline.context_length,
        otlp_endpoint=desired.otlp_endpoint,
        **({} if desired.cache is None else {"cache": desired.cache}),
    )
    settled = _settled(settings, observed.app(ref))
    return Application(ref.app, ref.route, settled, KeyState(jwks=desired.jwks))


_IDENTITY = ("tenant", "model", "version", "protection", "replica", "key_id", "public_key", "manifest_sha256")


def _settled(wanted: EngineSettings, deployed: Deployed | None) -> EngineSettings:
    """The settings that already stand, if they are of the same replica under the same key."""
    standing = deployed.application.settings if deployed and deployed.application else None
    if not isinstance(standing, EngineSettings):
        return wanted
    same = all(getattr(standing, f) == getattr(wanted, f) for f in _IDENTITY)
    return standing if same else wanted


def _to_be_redeployed(state: State | None, deployed: Deployed | None, now: datetime) -> bool:
    """A failed application of a version in use is taken out for one write, then deployed again.

    Ray does not try again by itself once a deployment has failed. A STAGED version
    is given up instead (see ``plan``).
    """
    if deployed is None or deployed.status is not AppStatus.DEPLOY_FAILED or state is State.STAGED:
        return False
    return now - deployed.deployed_at >= REDEPLOY_AFTER


def removable(version: KeyVersionRead, model: ModelRead, observed: Observed, now: datetime) -> bool:
    """Whether nothing of an ended version is queued or in flight at the application that serves it.

    A reading counts only once the application refuses new requests, that is when
    Ray says RUNNING with ``gone`` in force. Without a reading the longest request
    has to be over.
    """
    ref = Ref.of(version)
    deployed, usage = observed.app(ref, model), observed.usage.get(ref)
    if version.state not in _ENDED or deployed is None:
        return False
    if deployed.status in {AppStatus.DEPLOY_FAILED, AppStatus.NOT_STARTED, AppStatus.DELETING}:
        return True
    if deployed.status is AppStatus.RUNNING and usage is not None:
        return _refusing(deployed, ref) and usage.in_flight == 0
    if deployed.status is AppStatus.DEPLOYING and version.activated_at is None:
        return True  # never served anyone
    return now >= version.updated_at + timedelta(seconds=model.policy.longest_request_s)


def _refusing(deployed: Deployed, ref: Ref) -> bool:
    if deployed.application is None:
        return False
    state = deployed.application.state
    answering = state if isinstance(state, KeyState) else deployed.application.member(ref)
    return answering is not None and answering.status == "gone"


def _unknown(desired: Desired, observed: Observed) -> list[Application]:
    known = {Ref.of(v).app for v in desired.versions} | {b.ref.app for b in desired.baselines} | {DOOR}
    known |= {pool_name(pool) for pool in pools.sharing(desired)}
    standing = (observed.deployed or {}).values()
    return [d.application for d in standing if d.application is not None and d.name not in known]
