"""Resources, versions and clusters in every combination, for property tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tests.operator.kubernetes.objects import encrypted_model, held, serving_cluster

from anamorph.wire.admin import Autoscaling, KeyVersionRead, Materialized, ModelRead, Probe, Serving
from anamorph.wire.serving import EngineSettings, KeyState
from anamorph.wire.states import State
from anamorph_operator.begin import BASE_OUTSIDE
from anamorph_operator.kubernetes.conditions import Known
from anamorph_operator.kubernetes.resources.objects import EncryptedModel, ServingCluster
from anamorph_operator.kubernetes.trouble import Problem
from anamorph_operator.state import Application, AppStatus, Check, Deployed, Job, Observed, Outcome, Ref

# No test is of how fast a busy machine draws.
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
T0 = datetime(2026, 1, 1, tzinfo=UTC)
PLACES = {"main": "https://main.example.com", "next": "https://next.example.com"}
ARTIFACT = Materialized(
    replica="s3://r/1", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((2,),))
)


def resource(name: str = "chat", /, metadata: dict[str, Any] | None = None, **changes: Any) -> EncryptedModel:
    """One ``EncryptedModel`` as the API server holds it; ``changes`` of its spec, by paths."""
    return EncryptedModel.read(held(encrypted_model(name, **changes), **(metadata or {})))


def serving(name: str = "main", /, **changes: Any) -> ServingCluster:
    """One ``ServingCluster`` as the API server holds it."""
    return ServingCluster.read(held(serving_cluster(name, **changes)))


def record(of: EncryptedModel, **fields: Any) -> ModelRead:
    """A model's record in the key service."""
    made = ModelRead(
        id=of.model,
        tenant=of.tenant,
        base=of.spec.base.uri,
        vocab_size=of.spec.vocab_size,
        context_length=of.spec.context_length,
        created_at=T0,
        last_version=10,
    )
    return made.model_copy(update=fields)


def version(number: int, state: State, of: EncryptedModel | None = None, **fields: Any) -> KeyVersionRead:
    """A version of a model, with the key id that it would have."""
    tenant, model = ("acme", "chat") if of is None else of.key
    made = KeyVersionRead(
        tenant=tenant,
        model=model,
        version=number,
        state=state,
        key_id=f"{tenant}.{model}.v{number}.{number:016x}",
        row_version=1,
        created_at=T0,
        updated_at=T0,
    )
    return made.model_copy(update=fields)


def deployed(of: KeyVersionRead, status: AppStatus = AppStatus.RUNNING) -> Deployed:
    """The application of a version, as Ray reports it."""
    ref = Ref.of(of)
    settings = EngineSettings(
        tenant=ref.tenant, model=ref.model, version=ref.version, replica="s3://r/1", context_length=64
    )
    return Deployed(ref.app, status, Application(ref.app, ref.route, settings, KeyState()), T0, "why")


@st.composite
def versions(draw: st.DrawFn, most: int = 4) -> tuple[KeyVersionRead, ...]:
    """A few versions in any states at all, also such as never meet."""
    found = []
    for number in draw(st.lists(st.integers(1, 30), unique=True, max_size=most)):
        fields: dict[str, Any] = {
            "key_id": draw(st.sampled_from([None, f"acme.chat.v{number}.{number:016x}"])),
            "artifact": draw(st.sampled_from([None, ARTIFACT])),
            "activated_at": draw(st.sampled_from([None, T0])),
            "failure": draw(st.sampled_from([None, "", BASE_OUTSIDE, "x" * 2000])),
            "endpoint": draw(st.sampled_from([None, f"{PLACES['next']}/acme/chat/v{number}", "https://old"])),
        }
        found.append(version(number, draw(st.sampled_from(State)), **fields))
    return tuple(found)


@st.composite
def observations(draw: st.DrawFn, of: tuple[KeyVersionRead, ...]) -> Observed | None:
    """What stands of these versions: anything, or nobody knows."""
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    there = [v for v in of if draw(st.booleans())]
    apps = {d.name: d for d in (deployed(v, draw(st.sampled_from(AppStatus))) for v in there)}
    return Observed(
        deployed=draw(st.sampled_from([apps, apps, None])),
        jobs={Ref.of(v): Job(draw(st.booleans()), 1) for v in of if draw(st.booleans())},
        checks={Ref.of(v): Check(draw(st.sampled_from(Outcome)), 1, T0) for v in of if draw(st.booleans())},
    )


@st.composite
def knowledge(draw: st.DrawFn) -> Known:
    """Anything that may be known of one model."""
    found = draw(versions())
    kinds = [
        Serving(),
        Serving(autoscaling=Autoscaling(min_replicas=0)),
        Serving(placement="shared", pool="p"),
    ]
    model = record(resource(), serving=draw(st.sampled_from(kinds)))
    troubles = draw(st.dictionaries(st.sampled_from(Problem), st.sampled_from(["", "why"]), max_size=3))
    return Known(draw(st.sampled_from([None, model])), found, draw(observations(found)), troubles)
