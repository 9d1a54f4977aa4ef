"""Whose rows a session sees: by the session itself on both databases, and by PostgreSQL once more."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import delete, exists, insert, literal_column, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, func, select

from anamorph import errors
from anamorph.wire.admin import Role, RotationPolicyPatch, UsageReport
from anamorph.wire.audit import first_break
from anamorph_keysvc import audit
from anamorph_keysvc.credentials import hashed
from anamorph_keysvc.database import Database
from anamorph_keysvc.prepared import PreparedInsert, PreparedSelect
from anamorph_keysvc.scope import PLATFORM, WORKER, Scope, owner_of, tenant_scope
from anamorph_keysvc.service import lifecycle, rotation, tenants, usage
from anamorph_keysvc.tables import (
    OWNED,
    ApiKey,
    Audit,
    KeyVersion,
    Model,
    SigningKey,
    Tenant,
    Webhook,
)

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

ACME = tenant_scope("acme")
ONLY_POSTGRESQL = pytest.mark.parametrize(
    "database", [pytest.param("postgresql", marks=pytest.mark.real)], indirect=True
)
REFUSED = "cannot be narrowed"


@pytest.fixture
def two(world: World) -> World:
    """Two tenants with a model each of the same name."""
    for tenant in ("acme", "globex"):
        world.model(tenant)
        world.active(tenant)
    return world


def versions(session: Session) -> Any:
    other = aliased(KeyVersion)
    return {
        "select": session.exec(select(KeyVersion)).all(),
        "columns": session.exec(select(KeyVersion.tenant, KeyVersion.state)).all(),
        "alias": session.exec(select(other)).all(),
        "where": session.exec(select(KeyVersion).where(KeyVersion.tenant == "globex")).all(),
    }


def test_a_select_finds_the_tenants_own_rows_only(two: World) -> None:
    """Whole rows, columns, aliases; asking for another tenant's finds nothing."""
    with two.service.database.read(ACME) as session:
        found = versions(session)
    assert {name: [row.tenant for row in rows] for name, rows in found.items()} == {
        "select": ["acme"],
        "columns": ["acme"],
        "alias": ["acme"],
        "where": [],
    }


def test_every_table_of_tenants_is_narrowed(two: World) -> None:
    """Also those that a service function has no business in."""
    with two.service.database.read(ACME) as session:
        for table in OWNED:
            assert {owner_of(row) for row in session.exec(select(table))} <= {"acme"}, table
        assert [tenant.id for tenant in session.exec(select(Tenant))] == ["acme"]


def test_a_row_is_not_got_by_its_key(two: World) -> None:
    """Another tenant's row is as if it were not there, locked or not."""
    with two.service.database.write(ACME) as session:
        for key, found in (("acme", True), ("globex", False)):
            for lock in (None, True):
                row = session.get(KeyVersion, (key, "chat", 1), with_for_update=lock)
                assert (row is not None) == found, (key, lock)
        assert session.get(Tenant, "globex") is None


def test_joins_subqueries_and_counts_are_narrowed(two: World) -> None:
    """The criterion goes into every part of a statement."""
    inner = select(KeyVersion.tenant, KeyVersion.model).where(KeyVersion.state == "ACTIVE").subquery()
    table = select(KeyVersion.tenant, KeyVersion.model).cte()
    with two.service.database.read(ACME) as session:
        joined = select(KeyVersion, Model).join(Model, col(Model.id) == KeyVersion.model)
        assert {(version.tenant, model.tenant) for version, model in session.exec(joined)} == {
            ("acme", "acme")
        }
        assert session.exec(select(func.count()).select_from(KeyVersion)).one() == 1
        assert session.exec(select(func.count(col(KeyVersion.version)))).one() == 1
        foreign = select(Model.id).where(exists().where(col(KeyVersion.tenant) == "globex"))
        assert session.exec(foreign).all() == []
        for part in (inner, table):
            narrowed = select(Model.id, part.c.tenant).join(part, part.c.model == Model.id)
            assert {tenant for _, tenant in session.execute(narrowed)} == {"acme"}


WEBHOOK = """
INSERT INTO webhook (id, tenant, url, events, ciphertext, kek_version, enabled, created_at)
VALUES (?, ?, 'u', '[]', 'c', 1, TRUE, ?)
"""


def test_updates_and_deletes_reach_own_rows_only(two: World) -> None:
    """A statement without any condition changes the tenant's rows, not the table's."""
    for tenant in ("acme", "globex"):
        two.sql(WEBHOOK, tenant, tenant, two.clock.now)
    with two.service.database.write(ACME) as session:
        assert session.exec(delete(Webhook)).rowcount == 1
        assert session.exec(update(Model).values(base="mine")).rowcount == 1
    assert two.sql("SELECT tenant FROM webhook") == [("globex",)]
    assert two.sql("SELECT tenant, base FROM model ORDER BY 1") == [
        ("acme", "mine"),
        ("globex", "file:///base"),
    ]


TABLES = Tenant.metadata.tables
RAW: dict[str, Any] = {
    "text": text("SELECT * FROM key_version"),
    "text made to rows": select(KeyVersion).from_statement(text("SELECT * FROM key_version")),
    "a condition in text": select(KeyVersion).where(text("1 = 1 OR 1 = 1")),
    "a column in text": select(KeyVersion.state, literal_column("(SELECT max(kek) FROM tenant)")),
    "a table": select(TABLES["key_version"]),
    "a table that is joined": select(KeyVersion).join(TABLES["model"], TABLES["model"].c.id == "chat"),
    "a table's column": select(KeyVersion.state, TABLES["model"].c.tenant),
    "a table to select from": select(KeyVersion).select_from(TABLES["model"]),
    "a union": select(KeyVersion.tenant).union_all(select(KeyVersion.tenant)),
    "nothing at all": select(func.count()),
    "an insert": insert(ApiKey).values(id="k", tenant="globex", name="n", role="admin", hash="h"),
    "a row given away": update(KeyVersion).values(tenant="globex"),
    "a tenant renamed": update(Tenant).values(id="globex"),
}


@pytest.mark.parametrize("statement", RAW)
def test_what_cannot_be_narrowed_is_refused(world: World, statement: str) -> None:
    """Before it reaches the database: that is a mistake in the code, not of the caller."""
    with pytest.raises(RuntimeError, match=REFUSED), world.service.database.write(ACME) as session:
        session.execute(RAW[statement])


def test_rows_changed_by_their_key_are_refused(world: World) -> None:
    """An update in bulk has no condition to narrow."""
    rows = [{"tenant": "globex", "id": "chat", "base": "mine"}]
    with pytest.raises(RuntimeError, match=REFUSED), world.service.database.write(ACME) as session:
        session.execute(update(Model), rows)


VERSION, MODEL = TABLES["key_version"], TABLES["model"]
HALF: dict[str, Any] = {
    "text": sa.select(VERSION).where(text("1 = 1 OR 1 = 1")),
    "a column in text": sa.select(VERSION.c.state, literal_column("(SELECT max(kek) FROM tenant)")),
    "a table of nobody": sa.select(TABLES["signing_key"]),
    "an alias": sa.select(VERSION.alias()),
    "a join": sa.select(VERSION).join(MODEL, MODEL.c.id == VERSION.c.model),
    "a subquery": sa.select(sa.select(VERSION).subquery()),
    "a condition on another table": sa.select(VERSION).where(sa.exists(sa.select(MODEL.c.id))),
    "a value from another table": sa.select(VERSION.c.state, sa.select(MODEL.c.id).scalar_subquery()),
    "a union within": sa.select(sa.union_all(sa.select(MODEL.c.id), sa.select(MODEL.c.id)).subquery()),
}


@pytest.mark.parametrize("statement", HALF)
def test_a_query_that_criteria_reach_in_part_is_not_prepared(statement: str) -> None:
    """Whatever is not a table of tenants that the query itself names."""
    with pytest.raises(TypeError, match="as a whole"):
        PreparedSelect(HALF[statement])


def test_a_prepared_query_is_narrowed_to_its_session(two: World) -> None:
    """Every table in it, whatever is asked for; scopes above tenants see all."""
    pairs = PreparedSelect(sa.select(VERSION.c.tenant, MODEL.c.tenant).where(MODEL.c.id == VERSION.c.model))
    of_one = PreparedSelect(sa.select(VERSION.c.tenant).where(VERSION.c.tenant == sa.bindparam("wanted")))
    with two.service.database.read(ACME) as session:
        assert pairs.run(session).all() == [("acme", "acme")]
        assert of_one.run(session, wanted="acme").all() == [("acme",)]
        assert of_one.run(session, wanted="globex").all() == []
        assert of_one.run(session, wanted="globex", scope_tenant="globex").all() == []
    for scope in (PLATFORM, WORKER):
        with two.service.database.read(scope) as session:
            assert len(pairs.run(session).all()) == 4
            assert of_one.run(session, wanted="globex").all() == [("globex",)]


def test_no_row_of_another_tenant_is_added_by_a_prepared_insert(two: World) -> None:
    """Before it reaches the database."""
    row = {
        "id": "k",
        "tenant": "globex",
        "name": "n",
        "role": Role.ADMIN,
        "hash": "h",
        "created_at": two.clock.now,
    }
    prepared = PreparedInsert(insert(TABLES["api_key"]))
    with pytest.raises(RuntimeError, match="not this tenant's"), two.service.database.write(ACME) as session:
        prepared.run(session, row)
    assert two.sql("SELECT id FROM api_key WHERE id = 'k'") == []
    with two.service.database.write(tenant_scope("globex")) as session:
        prepared.run(session, row)
    assert two.sql("SELECT tenant FROM api_key WHERE id = 'k'") == [("globex",)]


@pytest.mark.parametrize("tenant", ["globex", None])
def test_a_row_of_another_tenant_is_not_written(two: World, tenant: str | None) -> None:
    """Neither a new one nor an own one that is given away; the platform's are another's, too."""
    row = ApiKey(
        id="k", tenant=tenant, name="n", role=Role.ADMIN, hash="h", created_at=two.clock.now, revoked_at=None
    )
    with pytest.raises(RuntimeError, match="not this tenant's"), two.service.database.write(ACME) as session:
        session.add(row)
    with pytest.raises(RuntimeError, match="not this tenant's"):
        give_away(two, "globex")
    assert two.sql("SELECT id FROM api_key WHERE id = 'k'") == []


def give_away(world: World, tenant: str) -> None:
    with world.service.database.write(ACME) as session:
        model = session.exec(select(Model)).one()
        model.tenant = tenant
        session.add(model)


def test_scopes_above_tenants_see_all(two: World) -> None:
    """The platform and the worker."""
    for scope in (PLATFORM, WORKER):
        with two.service.database.read(scope) as session:
            assert {row.tenant for row in session.exec(select(KeyVersion))} == {"acme", "globex"}


def test_reading_changes_nothing(two: World) -> None:
    """A session to read with is not one to write with; PostgreSQL says so."""
    before = two.sql("SELECT * FROM model ORDER BY 1")
    refusal = pytest.raises(DBAPIError, match="read-only") if two.dialect == "postgresql" else nullcontext()
    with refusal, two.service.database.read(PLATFORM) as session:
        session.execute(update(Model).values(base="mine"))
    assert two.sql("SELECT * FROM model ORDER BY 1") == before


# PostgreSQL itself, past the sessions.


def raw(world: World, scope: Scope | None, statement: str) -> list[Any]:
    """A statement as the service's login role, in a scope or in none, with no session between."""
    engine = world.service.database.engine
    with engine.connect().execution_options(anamorph_scope=scope) as connection:
        rows = connection.execute(text(statement))
        found = list(rows) if rows.returns_rows else []
        connection.commit()
    return found


@ONLY_POSTGRESQL
def test_without_a_scope_nothing_is_allowed(two: World) -> None:
    """The login role has no right to any table, nor to the lookup."""
    for table in Tenant.metadata.tables:
        with pytest.raises(DBAPIError, match="permission denied"):
            raw(two, None, f"SELECT 1 FROM {table}")
    with pytest.raises(DBAPIError, match="permission denied"):
        raw(two, None, "SELECT * FROM find_credential('x')")


@ONLY_POSTGRESQL
def test_row_security_holds_by_itself(two: World) -> None:
    """With the session's narrowing out of the way: every table, every verb."""
    for table in OWNED:
        name = table.__tablename__
        assert {tenant for (tenant,) in raw(two, ACME, f"SELECT tenant FROM {name}")} <= {"acme"}, name
    assert raw(two, ACME, "SELECT id FROM tenant") == [("acme",)]
    assert raw(two, ACME, "UPDATE model SET base = 'x' WHERE tenant = 'globex' RETURNING id") == []
    assert raw(two, ACME, "SELECT id FROM model WHERE tenant = 'globex' FOR UPDATE") == []
    for statement in (
        "UPDATE model SET tenant = 'globex'",
        "INSERT INTO api_key SELECT 'k', 'globex', 'n', 'admin', 'h', now(), NULL",
        "INSERT INTO api_key SELECT 'k', NULL, 'n', 'platform', 'h', now(), NULL",
    ):
        with pytest.raises(DBAPIError, match="row-level security"):
            raw(two, ACME, statement)


@ONLY_POSTGRESQL
def test_without_a_tenant_the_apis_role_sees_nothing(two: World) -> None:
    """A forgotten tenant is nobody, not everybody; the platform's key, which has none, does not match it."""
    for scope in (Scope("anamorph_api"), Scope("anamorph_api", "")):
        for table in OWNED:
            assert raw(two, scope, f"SELECT 1 FROM {table.__tablename__}") == [], table


@ONLY_POSTGRESQL
def test_a_scope_ends_with_its_transaction(two: World) -> None:
    """The next user of a pooled connection begins with no role and no tenant."""
    database = two.service.database
    for _ in range(3):
        with database.read(ACME) as session:
            session.exec(select(Model)).all()
        with pytest.raises(errors.NotFound), database.write(ACME):
            raise errors.NotFound("x")
        row = "SELECT current_user::text, current_setting('anamorph.tenant', true)"
        ((user, tenant),) = raw(two, None, row)
        assert (user, tenant or "") == ("anamorph_service", "")


NOT_ALLOWED = [
    (WORKER, "INSERT INTO tenant VALUES ('x', '', 'k', '{}', now())"),
    (WORKER, "DELETE FROM tenant"),
    (WORKER, "UPDATE tenant SET kek = 'x'"),
    (WORKER, "INSERT INTO api_key SELECT 'k', 'acme', 'n', 'admin', 'h', now(), NULL"),
    (WORKER, "UPDATE release_grant SET voided_at = NULL"),
    (WORKER, "DELETE FROM key_version"),
    (WORKER, "UPDATE audit SET actor = 'x'"),
    (WORKER, "SELECT * FROM find_credential('x')"),
    (PLATFORM, "DELETE FROM audit"),
    (PLATFORM, "UPDATE signing_key SET ciphertext = NULL"),
    (PLATFORM, "SELECT * FROM find_credential('x')"),
    (PLATFORM, "UPDATE alembic_version SET version_num = 'x'"),
    (ACME, "UPDATE tenant SET quota = '{}'"),
    (ACME, "SELECT * FROM backup"),
    (ACME, "DELETE FROM api_key"),
    (ACME, "UPDATE usage SET tokens = 0"),
    (ACME, "INSERT INTO audit_checkpoint SELECT 'acme', 1, 'd', now(), 1, 's', now()"),
    (ACME, "TRUNCATE audit"),
    (ACME, "ALTER TABLE model DISABLE ROW LEVEL SECURITY"),
    (ACME, "ALTER TABLE audit DISABLE TRIGGER ALL"),
    (ACME, "CREATE TABLE public.mine (id text)"),
    (ACME, "CREATE TEMPORARY TABLE key_version (version integer)"),
    (ACME, "SET LOCAL session_replication_role = replica"),
    (ACME, "SET LOCAL ROLE anamorph_migrator"),
]


@ONLY_POSTGRESQL
def test_no_role_does_what_is_not_its_part(two: World) -> None:
    """Rights that are missing, besides those that the catalogue's test lists: tried one by one."""
    for scope, statement in NOT_ALLOWED:
        with pytest.raises(DBAPIError, match=r"permission denied|must be owner"):
            raw(two, scope, statement)


@ONLY_POSTGRESQL
def test_row_security_cannot_be_switched_off_by_its_setting(two: World) -> None:
    """``row_security = off`` asks for an error where rows would be hidden, not for the rows."""
    with pytest.raises(DBAPIError, match="row-level security"):
        raw(two, ACME, "SET LOCAL row_security = off; SELECT * FROM model")


def test_a_credential_is_found_whosever_it_is(two: World) -> None:
    """By its hash, before the tenant is known; a grant with its place, a revoked key as revoked."""
    two.secret(Role.ADMIN, "globex")
    grant = two.grant(two.rotate("globex"), "globex")
    two.sql("UPDATE api_key SET revoked_at = created_at WHERE tenant = 'globex'")
    find = two.service.database.find_credential
    key = find(hashed(two.keys["globex", Role.ADMIN]))
    assert key is not None
    assert (key.tenant, key.role, key.version, key.revoked) == ("globex", "admin", None, True)
    granted = find(hashed(grant))
    assert granted is not None
    assert (granted.tenant, granted.role, granted.model, granted.version) == ("globex", None, "chat", 2)
    platform = find(hashed(two.home.platform_key.read_text()))
    assert platform is not None
    assert (platform.tenant, platform.role) == (None, "platform")
    assert find("' OR 1=1 --") is None


# Many at once.


def at_once(many: list[Callable[[], Any]]) -> list[Any]:
    """Everything in a thread of its own, begun together; the answers, or the errors."""
    barrier = threading.Barrier(len(many))
    answers: list[Any] = [None] * len(many)

    def run(place: int) -> None:
        barrier.wait()
        try:
            answers[place] = many[place]()
        except Exception as error:  # noqa: BLE001 -- the test looks at it
            answers[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(many))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.fixture
def without_deadlocks(two: World) -> Iterator[World]:
    """Neither a deadlock in the database, nor a break in a chain."""
    yield two
    if two.dialect == "postgresql":
        counted = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert two.sql(counted) == [(0,)]
    for tenant in ("acme", "globex"):
        with two.service.database.read(PLATFORM) as session:
            rows = session.exec(select(Audit).where(Audit.tenant == tenant).order_by(col(Audit.sequence)))
            assert first_break([audit.read(row) for row in rows], tenant=tenant) is None


def test_of_many_rotations_of_a_model_one_wins(without_deadlocks: World) -> None:
    """64 threads: one version, and 63 are told of the rotation that is in flight."""
    world = without_deadlocks
    answers = at_once([world.rotate] * 64)
    assert [answer for answer in answers if isinstance(answer, int)] == [2]
    codes = Counter(getattr(answer, "code", None) for answer in answers if not isinstance(answer, int))
    assert codes == {"rotation_in_flight": 63}


def test_many_releases_of_a_tenant_all_succeed(without_deadlocks: World) -> None:
    """They share one audit chain, in which each has its row; none is refused for another's sake."""
    world = without_deadlocks
    answers = at_once([lambda: world.release_to_client("acme", "chat", 1)] * 32)
    assert {type(answer).__name__ for answer in answers} == {"ReleaseRead"}
    released = world.sql("SELECT count(*) FROM audit WHERE tenant = 'acme' AND action = 'release'")
    assert released == [(33,)]  # with the one to the job


def test_models_of_a_tenant_rotate_side_by_side(without_deadlocks: World) -> None:
    """Nothing but the audit chain is shared: every rotation succeeds."""
    world = without_deadlocks
    for number in range(12):
        world.model("acme", f"m{number}")
    answers = at_once([partial(world.rotate, "acme", f"m{number}") for number in range(12)])
    assert answers == [1] * 12


def test_calls_that_meet_on_the_same_rows_do_not_lock_each_other_out(without_deadlocks: World) -> None:
    """Policy, usage, release, rotation and its cancelling: each gets its turn, or a plain conflict."""
    world = without_deadlocks
    at = ("acme", "chat", 1)

    def rotate_and_cancel() -> None:
        operation = world.do(rotation.rotate, "acme", "chat")
        at_once([lambda: world.do(rotation.cancel, "acme", operation.id)] * 2)

    calls: list[Callable[[], Any]] = [
        lambda: world.do(tenants.update_policy, "acme", "chat", RotationPolicyPatch(grace_s=70)),
        lambda: world.do(usage.report, *at, UsageReport(source="s", tokens=1)),
        lambda: world.release_to_client(*at),
        lambda: world.do(lifecycle.destroy, *at, None),
        rotate_and_cancel,
    ]
    for _ in range(4):
        answers = at_once(calls * 3)
        unexpected = [answer for answer in answers if isinstance(answer, Exception)]
        assert {type(error) for error in unexpected} <= {errors.Conflict}


def test_signing_keys_are_no_tenants(two: World) -> None:
    """A tenant's session reads them, to issue a token, and writes none."""
    with two.service.database.read(ACME) as session:
        assert len(session.exec(select(SigningKey)).all()) == 1
    key = SigningKey(kid="k", public_key="p", created_at=two.clock.now, signs_from=two.clock.now)
    with pytest.raises(RuntimeError), two.service.database.write(ACME) as session:
        session.add(key)


@ONLY_POSTGRESQL
def test_more_callers_than_connections_wait_their_turn(two: World) -> None:
    """With one connection for all of them, each is served."""
    url = two.service.database.engine.url.render_as_string()
    narrow = Database.postgresql(url.replace("+psycopg", ""), pool_size=1)

    def count() -> int:
        with narrow.read(PLATFORM) as session:
            return len(session.exec(select(KeyVersion)).all())

    assert at_once([count] * 16) == [2] * 16
    narrow.close()
