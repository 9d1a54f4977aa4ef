"""The list of Ray Serve applications as a function of what is wanted and what is there.

Rules, each of which a property test holds on to:
- the door comes first and is always there;
- a version is served from STAGED until it is gone *and* idle;
- the arguments of an application that stands are never changed: a change would make
  Ray replace it in place, and for a while two keys would answer under one path;
- an application that the key service does not know is left alone: an answer from a
  restored or wrong database must not take a service down.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.serving import DoorState, EngineSettings, KeyState, Route
from anamorph.wire.states import GONE, SERVABLE, State
from anamorph_operator.state import Application, AppStatus, Baseline, Deployed, Desired, Observed, Ref

DOOR = "door"
# How long a failed application of a version in use waits before it is deployed anew.
REDEPLOY_AFTER = timedelta(seconds=15)
_ENDED = GONE | {State.FAILED}


def applications(desired: Desired, observed: Observed, now: datetime) -> tuple[Application, ...]:
    """Every application that should stand after the next write, door first."""
    served = [
        *(_baseline_app(desired, observed, baseline, now) for baseline in desired.baselines),
        *(_version_app(desired, observed, version, now) for version in desired.versions),
    ]
    return _door(desired), *(app for app in served if app is not None), *_unknown(desired, observed)


def _door(desired: Desired) -> Application:
    # A version that is still being prepared has no key id, and nobody can ask for it yet.
    known = (version for version in desired.versions if version.key_id and version.state is not State.FAILED)
    routes = tuple(_route(version) for version in known)
    return Application(DOOR, "/", None, DoorState(jwks=desired.jwks, routes=routes))


def _route(version: KeyVersionRead) -> Route:
    names = {State.ACTIVE: "serving", State.DRAINING: "serving", State.SUSPENDED: "suspended"}
    status = "gone" if version.state in GONE else names.get(version.state, "pending")
    return Route.model_validate(
        {
            "tenant": version.tenant,
            "model": version.model,
            "version": version.version,
            "key_id": version.key_id,
            "status": status,
        }
    )


def _version_app(
    desired: Desired, observed: Observed, version: KeyVersionRead, now: datetime
) -> Application | None:
    ref, model = Ref.of(version), desired.model_of(Ref.of(version))
    deployed = observed.app(ref)
    if version.artifact is None or model is None or version.state not in SERVABLE | _ENDED:
        return None
    if version.state in _ENDED and (deployed is None or removable(version, model, observed, now)):
        return None
    if _to_be_redeployed(version.state, deployed, now):
        return None
    settings = _version_settings(desired, version, model)
    return Application(
        ref.app,
        ref.route,
        _settled(settings, deployed),
        KeyState(status=_status(version.state), jwks=desired.jwks),
    )


def _status(state: State) -> str:
    return "suspended" if state is State.SUSPENDED else "gone" if state in _ENDED else "serving"


def _version_settings(desired: Desired, version: KeyVersionRead, model: ModelRead) -> EngineSettings:
    assert version.artifact is not None  # noqa: S101 - _version_app has looked
    return EngineSettings(
        tenant=version.tenant,
        model=version.model,
        version=version.version,
        replica=version.artifact.replica,
        key_id=version.key_id,
        public_key=version.public_key,
        manifest_sha256=version.artifact.manifest_sha256,
        engine=model.engine,
        dtype=model.dtype,
        context_length=model.context_length,
        request_timeout_s=model.policy.longest_request_s,
        otlp_endpoint=desired.otlp_endpoint,
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
    )
    settled = _settled(settings, observed.app(ref))
    return Application(ref.app, ref.route, settled, KeyState(jwks=desired.jwks))


_IDENTITY = ("tenant", "model", "version", "protection", "replica", "key_id", "public_key", "manifest_sha256")


def _settled(wanted: EngineSettings, deployed: Deployed | None) -> EngineSettings:
    """The settings that already stand, if they are of the same replica under the same key."""
    standing = deployed.application.settings if deployed and deployed.application else None
    same = standing is not None and all(getattr(standing, f) == getattr(wanted, f) for f in _IDENTITY)
    return standing if standing is not None and same else wanted


def _to_be_redeployed(state: State | None, deployed: Deployed | None, now: datetime) -> bool:
    """A failed application of a version in use is taken out for one write, then deployed again.

    Ray does not try again by itself once a deployment has failed. A STAGED version
    is given up instead (see ``plan``).
    """
    if deployed is None or deployed.status is not AppStatus.DEPLOY_FAILED or state is State.STAGED:
        return False
    return now - deployed.deployed_at >= REDEPLOY_AFTER


def removable(version: KeyVersionRead, model: ModelRead, observed: Observed, now: datetime) -> bool:
    """Whether nothing is queued or in flight at an ended version's application.

    A reading counts only once the application refuses new requests, that is when
    Ray says RUNNING with ``gone`` in force. Without a reading the longest request
    has to be over.
    """
    ref = Ref.of(version)
    deployed, usage = observed.app(ref), observed.usage.get(ref)
    if version.state not in _ENDED or deployed is None:
        return False
    if deployed.status in {AppStatus.DEPLOY_FAILED, AppStatus.NOT_STARTED, AppStatus.DELETING}:
        return True
    if deployed.status is AppStatus.RUNNING and usage is not None:
        return _refusing(deployed) and usage.in_flight == 0
    if deployed.status is AppStatus.DEPLOYING and version.activated_at is None:
        return True  # never served anyone
    return now >= version.updated_at + timedelta(seconds=model.policy.longest_request_s)


def _refusing(deployed: Deployed) -> bool:
    state = deployed.application.state if deployed.application else None
    return isinstance(state, KeyState) and state.status == "gone"


def _unknown(desired: Desired, observed: Observed) -> list[Application]:
    known = {Ref.of(v).app for v in desired.versions} | {b.ref.app for b in desired.baselines} | {DOOR}
    standing = (observed.deployed or {}).values()
    return [d.application for d in standing if d.application is not None and d.name not in known]
