"""Every invariant of the key service, looked for in the database itself, as the role that sees all rows."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Engine
from sqlmodel import Session, col, select
from tests.keysvc.databases import engine_of

from anamorph.wire.admin import AuditRead, OperationStatus
from anamorph.wire.audit import first_break
from anamorph.wire.states import TRANSITIONS, State
from anamorph_keysvc import audit, roles
from anamorph_keysvc.tables import IN_FLIGHT, Audit, KeyVersion, Model, Operation

if TYPE_CHECKING:
    from tests.servers.production import Production

Row = TypeVar("Row")
Versions = dict[tuple[str, str, int], KeyVersion]


def check(production: Production) -> Versions:
    """All versions of all tenants, after everything that must hold of them was found to hold."""
    with (
        engine_of(production.postgres, production.database, roles.BACKUP) as engine,
        _snapshot(engine) as rows,
    ):
        versions = {(row.tenant, row.model, row.version): row for row in rows.exec(select(KeyVersion))}
        models = rows.exec(select(Model)).all()
        operations = rows.exec(select(Operation)).all()
        trail = [audit.read(row) for row in rows.exec(select(Audit).order_by(col(Audit.sequence)))]
        rows.expunge_all()
    for model in models:
        _check_model(model, [row for at, row in versions.items() if at[:2] == (model.tenant, model.id)])
    _check_trail(trail, versions)
    _check_operations(list(operations), versions)
    return versions


def _snapshot(engine: Engine) -> Session:
    """A session that sees one state of the database: the service goes on preparing keys meanwhile."""
    return Session(engine.execution_options(isolation_level="REPEATABLE READ"))


def _check_model(model: Model, versions: list[KeyVersion]) -> None:
    assert sorted(row.version for row in versions) == list(range(1, model.last_version + 1))
    states = [row.state for row in versions]
    assert states.count(State.ACTIVE) <= 1
    assert sum(state in IN_FLIGHT for state in states) <= 1
    assert all(row.ciphertext is None for row in versions if row.state is State.DESTROYED)
    serving = [row for row in versions if row.state in {State.STAGED, State.ACTIVE, State.DRAINING}]
    assert all(row.key_id and row.ciphertext for row in serving)


def _check_trail(trail: list[AuditRead], versions: Versions) -> None:
    """The chains hold, and of each version they tell exactly the transitions that led to its state."""
    for tenant in {row.tenant for row in trail}:
        assert first_break([row for row in trail if row.tenant == tenant], tenant=tenant) is None
    told: dict[tuple[str, str], list[AuditRead]] = defaultdict(list)
    prepared: dict[tuple[str, str], int] = defaultdict(int)
    for row in trail:
        if "state" in row.detail:
            told[row.tenant, row.subject].append(row)
        prepared[row.tenant, row.subject] += row.action == "prepare"
    assert set(told) == {(tenant, f"{model}/keys/{number}") for tenant, model, number in versions}
    for (tenant, model, number), version in versions.items():
        place = (tenant, f"{model}/keys/{number}")
        _check_path([row.detail for row in told[place]], version)
        assert prepared[place] == (version.key_id is not None)
        assert version.row_version >= len(told[place]) + prepared[place]


def _check_path(path: list[dict[str, str | int | None]], version: KeyVersion) -> None:
    assert path[0]["state"] == State.PENDING
    assert path[-1]["state"] == version.state
    for before, after in pairwise(path):
        assert after["origin"] == before["state"]
        assert State(str(after["state"])) in TRANSITIONS[State(str(after["origin"]))]


def _check_operations(operations: list[Operation], versions: Versions) -> None:
    """Each version has its one rotation, which runs for as long as the version is in flight."""
    rotations = {(row.tenant, row.model, row.version): row for row in operations if row.kind == "rotate"}
    assert set(rotations) == set(versions)
    for place, operation in rotations.items():
        running = operation.status is OperationStatus.RUNNING
        assert running == (versions[place[0], str(place[1]), int(place[2] or 0)].state in IN_FLIGHT)
