"""The schema as the databases' own catalogues tell it: what ``alembic check`` does not compare, too."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from alembic import command
from sqlalchemy import CheckConstraint, Engine, Index
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, col, select
from tests.keysvc import databases
from tests.keysvc.databases import engine_of, sql
from tests.servers.postgres import SUPERUSER, PostgresServer

from anamorph.errors import SetupError
from anamorph.wire.admin import Serving
from anamorph.wire.states import TRANSITIONS, State
from anamorph_keysvc import roles, schema
from anamorph_keysvc.database import Database
from anamorph_keysvc.service.lookup import model_read
from anamorph_keysvc.tables import OWNED, KeyVersion, Model, Tenant

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

METADATA = Tenant.metadata
TRIGGERS = import_module("anamorph_keysvc.migrations.versions.0002_invariants")
SECURITY = import_module("anamorph_keysvc.migrations.versions.0003_row_security")
PROCESSES = 6
UPGRADE = """
import sys, sqlalchemy, anamorph_keysvc.schema
anamorph_keysvc.schema.upgrade(sqlalchemy.create_engine(sys.argv[1]))
"""
DEFINITION = "pg_get_constraintdef(oid)"
PUBLIC = "'public'::regnamespace"


@pytest.fixture
def postgres(postgres_server: PostgresServer, migrated: str) -> Iterator[str]:
    """The name of a migrated PostgreSQL database, this test's own."""
    with postgres_server.fresh(migrated) as name:
        yield name


@pytest.fixture
def admin(postgres_server: PostgresServer, postgres: str) -> Iterator[Engine]:
    with engine_of(postgres_server, postgres, SUPERUSER) as engine:
        yield engine


@pytest.fixture
def migrator(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An engine for migrations, on an empty database of each kind."""
    if database == "sqlite":
        empty = Database.sqlite(tmp_path / "empty.db")
        yield empty.engine
        empty.close()
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.fresh() as name:
        databases.set_up_roles(server, name)
        with engine_of(server, name, roles.MIGRATOR) as engine:
            yield engine


def tables_of(engine: Engine) -> set[str]:
    query = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table'",
        "postgresql": f"SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = {PUBLIC}",
    }[engine.dialect.name]
    return {name for (name,) in sql(engine, query)}


def everything_in(engine: Engine) -> set[Any]:
    """All that the schema holds: tables, indexes, triggers, constraints, functions, policies."""
    if engine.dialect.name == "sqlite":
        return {tuple(row) for row in sql(engine, "SELECT type, name, sql FROM sqlite_master")}
    queries = (
        f"SELECT relkind::text, relname::text, relacl::text FROM pg_class WHERE relnamespace = {PUBLIC}",
        "SELECT 'trigger', tgname::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
        f"SELECT 'constraint', conname::text, {DEFINITION} FROM pg_constraint WHERE connamespace = {PUBLIC}",
        f"SELECT 'function', proname::text, prosrc FROM pg_proc WHERE pronamespace = {PUBLIC}",
        "SELECT 'policy', policyname::text, qual FROM pg_policies",
        "SELECT 'schema', nspname::text, nspacl::text FROM pg_namespace WHERE nspname = 'public'",
    )
    return {tuple(row) for query in queries for row in sql(engine, query)}


# Migrations.


def test_the_migrated_schema_is_the_one_of_the_tables(migrator: Engine) -> None:
    """``alembic check`` finds nothing to change."""
    schema.upgrade(migrator)
    with migrator.connect() as connection:
        command.check(schema.alembic_config(connection))


def test_up_down_and_up_again_lead_to_the_same_schema(migrator: Engine) -> None:
    """At ``base`` nothing is left but alembic's own table."""
    schema.upgrade(migrator)
    first = everything_in(migrator)
    schema.downgrade(migrator, "base")
    assert tables_of(migrator) == {"alembic_version"}
    assert len(everything_in(migrator)) < 6, "something is left"
    schema.upgrade(migrator)
    assert everything_in(migrator) == first


def test_an_upgrade_keeps_the_data(migrator: Engine) -> None:
    """Rows written at an earlier revision are there at the newest; upgrading again changes nothing."""
    schema.upgrade(migrator, "k002")
    sql(
        migrator,
        "INSERT INTO tenant (id, display_name, kek, quota, created_at) VALUES (?, ?, ?, ?, ?)",
        *("acme", "", "t-1", "{}", "2030-01-01"),
    )
    for _ in range(2):
        schema.upgrade(migrator)
        assert sql(migrator, "SELECT id FROM tenant") == [("acme",)]


def test_models_of_before_are_served_by_the_defaults(migrator: Engine) -> None:
    """A row from before the column reads as what it was served as; the downgrade takes the column away."""
    schema.upgrade(migrator, "k003")
    sql(migrator, "INSERT INTO tenant VALUES (?, ?, ?, ?, ?)", "acme", "", "t-1", "{}", "2030-01-01")
    sql(
        migrator,
        "INSERT INTO model (tenant, id, base, profile, engine, dtype, vocab_size, context_length,"
        " policy, last_version, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *("acme", "chat", "b", "rotate", "torch", "auto", 9, 9, "{}", 0, "2030-01-01"),
    )
    before = columns_of(migrator, "model")
    schema.upgrade(migrator)
    assert columns_of(migrator, "model") - before == {
        ("serving", True),
        ("base_digest", False),
        ("row_version", True),
    }
    with Session(migrator) as session:
        row = session.get(Model, ("acme", "chat"))
        assert row is not None
        assert model_read(row).serving == Serving()
    schema.downgrade(migrator, "k003")
    assert columns_of(migrator, "model") == before


def test_grants_of_before_are_for_a_single_piece(migrator: Engine) -> None:
    """They stay current; the downgrade voids those of parts, of which a release of before knows nothing."""
    schema.upgrade(migrator, "k004")
    put(migrator, "tenant", "('acme', '', 't-1', '{}', '2030-01-01')")
    put(
        migrator,
        "model",
        "('acme', 'chat', 'b', 'rotate', 'torch', 'auto', 9, 9, '{}', 1, '2030-01-01')",
        MODEL,
    )
    put(migrator, "key_version", "('acme', 'chat', 1, 'PENDING', 1, '2030-01-01', '2030-01-01', 0)", VERSION)
    put(migrator, "release_grant", "('old', 'o', 'acme', 'chat', 1, '2030-01-01', '2030-01-01')", GRANT)
    before = columns_of(migrator, "release_grant")
    schema.upgrade(migrator)
    new = {("parts", True), ("part", True), ("done", True)}
    assert columns_of(migrator, "release_grant") == before | new
    assert sql(migrator, "SELECT id, parts, part, done FROM release_grant") == [("old", 0, 0, 0.0)]
    sql(migrator, "UPDATE release_grant SET part = 2, parts = 2")
    for part in range(2):
        more = f"('p{part}', 'p{part}', 'acme', 'chat', 1, '2030-01-01', '2030-01-01', {part}, 2)"
        put(migrator, "release_grant", more, f"{GRANT}, part, parts")
    schema.downgrade(migrator, "k004")
    assert columns_of(migrator, "release_grant") == before
    assert sql(migrator, "SELECT count(*) FROM release_grant WHERE voided_at IS NULL") == [(0,)]


def test_versions_of_before_get_their_models_settings(migrator: Engine) -> None:
    """Those that are not over: from now on the record may change. The downgrade takes all of it away."""
    schema.upgrade(migrator, "k006")
    put(migrator, "tenant", "('acme', '', 't-1', '{}', '2030-01-01')")
    serving = '{"tensor_parallel": 2}'
    model = f"('acme', 'chat', 'b', 'rotate', 'torch', 'auto', 9, 8, '{{}}', 2, '2030-01-01', '{serving}')"
    put(migrator, "model", model, f"{MODEL}, serving")
    for number in (1, 2):
        row = f"('acme', 'chat', {number}, 'PENDING', 1, '2030-01-01', '2030-01-01', 0)"
        put(migrator, "key_version", row, VERSION)
        if number == 1:
            sql(migrator, "UPDATE key_version SET state = 'FAILED', row_version = 2")
    before = [columns_of(migrator, table) for table in ("model", "key_version")]
    schema.upgrade(migrator)
    settings = {"base": "b", "base_digest": None, "engine": "torch", "dtype": "auto"}
    with Session(migrator) as session:
        over, pending = session.exec(select(KeyVersion).order_by(col(KeyVersion.version)))
        assert (over.settings, over.row_version) == (None, 2)
        assert pending.settings == {**settings, "context_length": 8, "serving": {"tensor_parallel": 2}}
        assert pending.row_version == 2
    schema.downgrade(migrator, "k006")
    assert [columns_of(migrator, table) for table in ("model", "key_version")] == before


MODEL = (
    "tenant, id, base, profile, engine, dtype, vocab_size, context_length, policy, last_version, created_at"
)
VERSION = "tenant, model, version, state, row_version, created_at, updated_at, served_tokens"
GRANT = "id, hash, tenant, model, version, created_at, expires_at"


def put(engine: Engine, table: str, values: str, columns: str = "") -> None:
    sql(engine, f"INSERT INTO {table} {f'({columns})' if columns else ''} VALUES {values}")


def columns_of(engine: Engine, table: str) -> set[tuple[str, bool]]:
    """Names, and whether each must have a value, from the catalogue."""
    query = {
        "sqlite": f"SELECT name, \"notnull\" = 1 OR pk > 0 FROM pragma_table_info('{table}')",
        "postgresql": "SELECT attname::text, attnotnull FROM pg_attribute"
        f" WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped",
    }[engine.dialect.name]
    return {(name, bool(needed)) for name, needed in sql(engine, query)}


def test_a_database_of_a_later_release_is_left_alone(migrator: Engine) -> None:
    """What this release does not know it does not upgrade; the message says what to do."""
    schema.upgrade(migrator)
    sql(migrator, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SetupError, match="9999"):
        schema.upgrade(migrator)


@pytest.mark.parametrize("database", [pytest.param("postgresql", marks=pytest.mark.real)], indirect=True)
def test_several_processes_may_upgrade_at_once(migrator: Engine) -> None:
    """They take turns by one lock: all succeed, and one has done the work."""
    url = migrator.url.render_as_string(hide_password=False)
    children = [subprocess.Popen([sys.executable, "-c", UPGRADE, url]) for _ in range(PROCESSES)]
    assert [child.wait(60) for child in children] == [0] * PROCESSES
    assert tables_of(migrator) == {"alembic_version", *METADATA.tables}
    assert sql(migrator, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]


@pytest.mark.real
def test_only_the_migrator_upgrades(admin: Engine) -> None:
    """An administrator would own the tables, and the lookup of credentials run with all of his rights."""
    with pytest.raises(SetupError, match=roles.MIGRATOR):
        schema.upgrade(admin)


@pytest.mark.real
def test_the_service_reads_the_revision_that_it_needs(postgres_server: PostgresServer, postgres: str) -> None:
    """Its login role has no rights, and still start-up can tell an old database from a new one."""
    database = Database.postgresql(postgres_server.dsn(postgres, roles.SERVICE))
    schema.check(database.engine, remedy="x")
    with engine_of(postgres_server, postgres, roles.MIGRATOR) as migrator:
        schema.downgrade(migrator, "k002")
        schema.upgrade(migrator)
        sql(migrator, "UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(SetupError, match="run 'x'"):
        schema.check(database.engine, remedy="x")
    database.close()


# Invariants, in the catalogues.


def definitions(world: World) -> dict[str, str]:
    """Every index, constraint and trigger by its name, as the database would write it."""
    if world.dialect == "sqlite":
        rows = [tuple(row) for row in world.sql("SELECT type, name, sql FROM sqlite_master")]
        # SQLite keeps constraints in the text of their table.
        parts = [part for kind, _, text in rows if kind == "table" for part in text.split("CONSTRAINT ")[1:]]
        named = {part.partition(" ")[0]: part.partition(" ")[2] for part in parts}
        return named | {name: text or "" for kind, name, text in rows if kind != "table"}
    queries = (
        "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        f"SELECT conname, {DEFINITION} FROM pg_constraint WHERE connamespace = {PUBLIC}",
        "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
    )
    return {name: text for query in queries for name, text in world.sql(query)}


def words(condition: object) -> list[str]:
    """Names, numbers, values and signs of a condition, however a database sets it out.

    PostgreSQL writes casts, and IN and BETWEEN in other words.
    """
    plain = re.sub(r"::(double precision|character varying|[a-z]+)(\[\])?", "", str(condition))
    plain = plain.replace("= ANY", "IN").replace("<> ALL", "NOT IN").replace("ARRAY", "")
    tokens = " ".join(re.findall(r"'\w*'|\w+|[<>=]+", plain))
    return re.sub(r"(\w+) >= (\d+) AND \1 <= (\d+)", r"\1 BETWEEN \2 AND \3", tokens).split()


def test_each_index_is_there_with_its_condition(world: World) -> None:
    """``alembic check`` sees no condition: one that is changed or lost would go unnoticed."""
    found = definitions(world)
    for index in indexes():
        definition = found[str(index.name)]
        assert ("UNIQUE" in definition) == bool(index.unique), index.name
        condition = index.dialect_options[world.dialect]["where"]
        _, _, written = definition.partition(" WHERE ")
        assert words(written) == ([] if condition is None else words(condition.text)), index.name
    assert sum(index.unique for index in indexes()) >= 5


def indexes() -> Iterator[Index]:
    for table in METADATA.sorted_tables:
        yield from table.indexes


def test_each_check_is_there_with_its_condition(world: World) -> None:
    """Written as declared, in the words of each database."""
    found = definitions(world)
    checks = [one for table in METADATA.sorted_tables for one in table.constraints if one.name]
    for constraint in checks:
        if not str(constraint.name).startswith("pk_") or world.dialect == "postgresql":
            assert str(constraint.name) in found, constraint.name
    declared = [one for one in checks if isinstance(one, CheckConstraint) and hasattr(one.sqltext, "text")]
    for check in declared:
        written = bracketed(found[str(check.name)].partition("CHECK")[2])
        assert words(written) == words(check.sqltext), check.name
    assert len(declared) > 15


def bracketed(text: str) -> str:
    """Up to where the first bracket closes: SQLite writes a column that came later behind it."""
    depth, ends = 0, len(text)
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if sign == ")" and depth == 0:
            ends = at
            break
    return text[:ends]


def test_each_trigger_is_there_at_its_event(world: World) -> None:
    """Those of the migration, and no other; on PostgreSQL they fire whatever is set."""
    found = {name: one for name, one in definitions(world).items() if "CREATE TRIGGER" in one}
    assert set(found) == set(TRIGGERS._triggers())
    for name, (event, _, message) in TRIGGERS._triggers().items():
        definition = found[name].replace("public.", "")
        assert f"BEFORE {event} " in definition, name
        assert message in definition, name
    if world.dialect == "postgresql":
        enabled = world.sql("SELECT DISTINCT tgenabled::text FROM pg_trigger WHERE NOT tgisinternal")
        assert enabled == [("O",)]


def test_the_triggers_know_the_same_transitions_as_the_code(world: World) -> None:
    """The condition that stands in the database, tried on every pair of states."""
    definition = definitions(world)["key_version_moves"].replace("\n", " ")
    ends = {"sqlite": " BEGIN ", "postgresql": " EXECUTE FUNCTION "}[world.dialect]
    condition = definition.partition(" WHEN ")[2].partition(ends)[0]
    states = " UNION ALL ".join(f"SELECT '{state}' AS state" for state in State)
    rows = world.sql(
        f"SELECT old.state, new.state FROM ({states}) AS old, ({states}) AS new WHERE NOT ({condition})"
    )
    admitted = {(State(old), State(new)) for old, new in rows if old != new}
    assert admitted == {(old, new) for old, news in TRANSITIONS.items() for new in news}


# PostgreSQL's roles and rights.


def with_a_tenant() -> set[str]:
    """Computed from the tables, so that a new one without row security is found."""
    return {"tenant", *(table.name for table in METADATA.sorted_tables if "tenant" in table.columns)}


def test_scopes_and_policies_know_every_table_with_a_tenant() -> None:
    """The lists that sessions and the migration go by are complete."""
    owned = {str(table.__tablename__) for table in OWNED}
    assert owned == set(SECURITY.OWNED) == with_a_tenant() - {"tenant"}
    assert set(METADATA.tables) == owned | {"tenant", *SECURITY.SHARED}


@pytest.mark.real
def test_row_security_is_enabled_and_forced_wherever_there_is_a_tenant(admin: Engine) -> None:
    """Forced: it binds the owner too, unless a role is exempt by name."""
    rows = sql(
        admin,
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relrowsecurity AND relforcerowsecurity",
    )
    assert {name for (name,) in rows} == with_a_tenant()


@pytest.mark.real
def test_each_table_has_one_policy_for_each_role(admin: Engine) -> None:
    """A tenant's callers see and write its rows only; who stands above tenants sees all."""
    rows = sql(admin, "SELECT tablename, roles::text[], permissive, cmd, qual, with_check FROM pg_policies")
    found = {(table, role): rest for table, (role,), *rest in rows}
    assert set(found) == {(table, role) for table in with_a_tenant() for role in roles.HOLDERS}
    for (table, role), (permissive, verb, qual, check) in found.items():
        column = "id" if table == "tenant" else "tenant"
        own = f"(({column})::text = NULLIF(current_setting('anamorph.tenant'::text, true), ''::text))"
        expected = own if role == "anamorph_api" else "true"
        assert (permissive, verb, qual, check) == ("PERMISSIVE", "ALL", expected, expected), table


@pytest.mark.real
def test_each_role_has_exactly_its_rights(admin: Engine) -> None:
    """Column by column as the migration lists them; PUBLIC and the login role have none at all."""
    rows = sql(
        admin,
        "SELECT relname, acl.grantee::regrole::text, string_agg(acl.privilege_type, ', ' ORDER BY 2)"
        " FROM pg_class, aclexplode(relacl) AS acl"
        f" WHERE relkind = 'r' AND relnamespace = {PUBLIC} AND acl.grantee <> relowner"
        " GROUP BY relname, acl.grantee",
    )
    found = {(table, role): set(rights.split(", ")) for table, role, rights in rows}
    assert found == {
        (table, role): {right for right in rights.split(", ") if "(" not in right}
        for role, listed in SECURITY.RIGHTS.items()
        for table, rights in listed.items()
    }
    columns = sql(
        admin,
        "SELECT attrelid::regclass::text, acl.grantee::regrole::text, acl.privilege_type, attname::text"
        " FROM pg_attribute, aclexplode(attacl) AS acl WHERE attrelid IN"
        f" (SELECT oid FROM pg_class WHERE relnamespace = {PUBLIC})",
    )
    assert {tuple(row) for row in columns} == {
        (table, role, *re.fullmatch(r".*?(\w+) \((\w+)\)", rights).groups())  # type: ignore[union-attr]
        for role, listed in SECURITY.RIGHTS.items()
        for table, rights in listed.items()
        if "(" in rights
    }


@pytest.mark.real
def test_the_lookup_of_credentials_is_pinned_down(admin: Engine) -> None:
    """It runs as the tables' owner, with a search path of its own, for the API's role alone."""
    rows = sql(
        admin,
        "SELECT proname, prosecdef, proconfig, proowner::regrole::text, acl.grantee::regrole::text"
        " FROM pg_proc, aclexplode(proacl) AS acl WHERE pronamespace = 'public'::regnamespace AND prosecdef",
    )
    pinned = ["search_path=pg_catalog, pg_temp"]
    assert {(name, definer, *path, owner, grantee) for name, definer, path, owner, grantee in rows} == {
        ("find_credential", True, *pinned, roles.MIGRATOR, grantee)
        for grantee in (roles.MIGRATOR, "anamorph_api")
    }


@pytest.mark.real
def test_the_migrator_owns_everything_and_the_service_nothing(admin: Engine) -> None:
    """Who owns a table may do everything to it, and switch its row security off."""
    owners = sql(
        admin,
        f"SELECT relowner::regrole::text FROM pg_class WHERE relnamespace = {PUBLIC}"
        f" UNION SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = {PUBLIC}",
    )
    assert owners == [(roles.MIGRATOR,)]


@pytest.mark.real
def test_each_role_is_what_its_part_needs(admin: Engine) -> None:
    """Nobody but migrator and backup is exempt from row security, and none may make roles."""
    rows = sql(
        admin,
        "SELECT rolname::text, rolcanlogin, rolinherit, rolbypassrls, rolsuper OR rolcreaterole OR"
        " rolcreatedb OR rolreplication FROM pg_roles WHERE rolname LIKE 'anamorph%'",
    )
    assert {tuple(row) for row in rows} == {
        *((role, False, False, False, False) for role in roles.HOLDERS),
        (roles.SERVICE, True, False, False, False),
        (roles.MIGRATOR, True, True, True, False),
        (roles.BACKUP, True, True, True, False),
    }


@pytest.mark.real
def test_setting_roles_up_again_does_nothing_and_mends_what_was_changed(admin: Engine) -> None:
    """It says what it did; what is as it should be it does not touch."""
    with admin.begin() as connection:
        assert [line for line in roles.setup(connection) if "database" not in line] == []
    with admin.begin() as connection:
        assert roles.setup(connection) == []
    sql(admin, f"ALTER ROLE {roles.SERVICE} BYPASSRLS")
    sql(admin, f"ALTER ROLE {roles.SERVICE} RESET lock_timeout")
    sql(admin, "GRANT CREATE ON SCHEMA public TO PUBLIC")
    with admin.begin() as connection:
        done = roles.setup(connection)
    assert len(done) == 3
    assert done[0] == "corrected role anamorph_service: NOBYPASSRLS"
    assert "CREATE on schema public" in done[2]


@pytest.mark.real
def test_a_service_role_with_rights_from_elsewhere_is_refused(admin: Engine) -> None:
    """Rights of another role are not taken from it unasked; the message has the statement that does."""
    sql(admin, f"GRANT {roles.MIGRATOR} TO {roles.SERVICE}")
    remedy = "REVOKE anamorph_migrator FROM anamorph_service"
    with pytest.raises(SetupError, match=remedy), admin.begin() as connection:
        roles.setup(connection)
    sql(admin, f"REVOKE {roles.MIGRATOR} FROM {roles.SERVICE}")


@pytest.mark.real
def test_serving_as_one_whom_row_security_does_not_bind_is_refused(
    postgres_server: PostgresServer, postgres: str, admin: Engine
) -> None:
    """As an administrator everything would work, and no tenant be kept from another."""
    for user in (roles.MIGRATOR, roles.BACKUP):
        with engine_of(postgres_server, postgres, user) as engine, pytest.raises(SetupError, match=user):
            roles.check(engine)
    with pytest.raises(SetupError, match=SUPERUSER):
        roles.check(admin)
    with engine_of(postgres_server, postgres, roles.SERVICE) as engine:
        roles.check(engine)


@pytest.mark.real
def test_the_backup_role_reads_everything_and_writes_nothing(
    postgres_server: PostgresServer, postgres: str, admin: Engine
) -> None:
    """Row security would leave its dumps empty without a word."""
    sql(admin, "INSERT INTO tenant VALUES ('acme', '', 't-1', '{}', '2030-01-01')")
    with engine_of(postgres_server, postgres, roles.BACKUP) as engine:
        assert sql(engine, "SELECT id FROM tenant") == [("acme",)]
        with pytest.raises(DBAPIError, match="read-only"):
            sql(engine, "DELETE FROM tenant")
        with pytest.raises(DBAPIError, match="permission denied"):
            sql(engine, "SET TRANSACTION READ WRITE; DELETE FROM tenant")
