"""PostgreSQL's roles of the service, made once per server by an administrator.

Three roles without login hold the rights (migration 0003). Processes log in as
``anamorph_service``, which has none of its own and takes one of the three for each
transaction. ``anamorph_migrator`` owns the tables, ``anamorph_backup`` reads them; row
security binds neither, since under it a migration of data would change nothing and a
dump be empty, without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine, text

from anamorph import errors

HOLDERS: Final = ("anamorph_api", "anamorph_platform", "anamorph_worker")
SERVICE: Final = "anamorph_service"
MIGRATOR: Final = "anamorph_migrator"
BACKUP: Final = "anamorph_backup"
SETUP: Final = "anamorph-keysvc database setup"

# Each attribute of a role, and how CREATE ROLE calls it.
_WORDS = {
    "rolcanlogin": "LOGIN",
    "rolinherit": "INHERIT",
    "rolbypassrls": "BYPASSRLS",
    "rolsuper": "SUPERUSER",
    "rolcreaterole": "CREATEROLE",
    "rolcreatedb": "CREATEDB",
    "rolreplication": "REPLICATION",
}
# What each role has of them; it has no other.
_ROLES = {
    **dict.fromkeys(HOLDERS, frozenset[str]()),
    SERVICE: frozenset({"rolcanlogin"}),
    MIGRATOR: frozenset({"rolcanlogin", "rolinherit", "rolbypassrls"}),
    BACKUP: frozenset({"rolcanlogin", "rolinherit", "rolbypassrls"}),
}
_MEMBERSHIPS = {SERVICE: HOLDERS, BACKUP: ("pg_read_all_data",)}
_SETTINGS = {
    # The service's own deadlines end first; these end what a process left behind when it died.
    SERVICE: {
        "statement_timeout": "5s",
        "lock_timeout": "3s",
        "idle_in_transaction_session_timeout": "10s",
    },
    BACKUP: {"default_transaction_read_only": "on"},
}


@dataclass(frozen=True)
class _Step:
    """``needed`` is a query for whether ``statement`` is still to be run; ``done`` says what it did."""

    needed: str
    statement: str
    done: str


def setup(connection: Connection) -> list[str]:
    """Make what is missing, correct what differs; answers what was done, in words.

    ``connection`` is a superuser's (only one may give BYPASSRLS), to the service's own
    database, in a transaction that the caller commits. No role gets a password: give the
    three that log in certificates, or passwords of your choice.

    Raises:
        SetupError: the connection's role may not do that, or the service's role has rights
            from elsewhere, which are not taken from it unasked.
    """
    _refuse_foreign_rights(connection)
    done = [line for role, wanted in _ROLES.items() if (line := _made(connection, role, wanted))]
    for step in (*_memberships(), *_settings(), *_places(connection)):
        if connection.execute(text(step.needed)).scalar_one():
            connection.execute(text(step.statement))
            done.append(step.done)
            # A REVOKE or GRANT that one may not do is a mere warning.
            if connection.execute(text(step.needed)).scalar_one():
                raise errors.SetupError(f"'{step.statement}' had no effect: run '{SETUP}' as a superuser")
    return done


def check(engine: Engine) -> None:
    """Refuse to serve as a role that row security does not bind.

    Raises:
        SetupError: the login role has too much or too little; with the remedy.
    """
    with engine.connect() as connection:
        user, unbound, missing = connection.execute(text(_LOGIN)).one()
    if unbound or user == MIGRATOR:
        raise errors.SetupError(
            f"'{user}' is not bound by row security: the service logs in as {SERVICE} ('{SETUP}' makes it)"
        )
    if missing:
        raise errors.SetupError(f"'{user}' may not act as {', '.join(missing)}: run '{SETUP}'")


_NAMES = ", ".join(f"'{role}'" for role in HOLDERS)
_LOGIN = f"""
SELECT session_user,
    (SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = session_user),
    (SELECT array_agg(wanted ORDER BY wanted) FROM unnest(ARRAY[{_NAMES}]) AS wanted
        WHERE NOT EXISTS (SELECT FROM pg_roles
            WHERE rolname = wanted AND pg_has_role(session_user, oid, 'MEMBER')))
"""  # noqa: S608 -- names of our own
# Rights that do not come by taking one of the three roles.
_FOREIGN = f"""
SELECT granted.rolname FROM pg_roles AS granted, pg_roles AS service
WHERE service.rolname = '{SERVICE}' AND granted.oid <> service.oid AND NOT service.rolsuper
    AND pg_has_role(service.oid, granted.oid, 'MEMBER')
    AND (granted.rolname NOT IN ({_NAMES})
        OR (NOT service.rolinherit AND pg_has_role(service.oid, granted.oid, 'USAGE')))
ORDER BY 1 LIMIT 1
"""  # noqa: S608 -- names of our own


def _refuse_foreign_rights(connection: Connection) -> None:
    other = connection.execute(text(_FOREIGN)).scalar()
    if other is not None:
        raise errors.SetupError(
            f"{SERVICE} has the rights of '{other}', which it must not inherit:"
            f" run 'REVOKE {other} FROM {SERVICE}' and then '{SETUP}' again"
        )


def _made(connection: Connection, role: str, wanted: frozenset[str]) -> str | None:
    """Make or correct one role; what was done, if anything."""
    columns = ", ".join(_WORDS)
    found = connection.execute(
        text(f"SELECT {columns} FROM pg_roles WHERE rolname = :role"),  # noqa: S608 -- names of our own
        {"role": role},
    ).one_or_none()
    known = {} if found is None else found._asdict()
    options = [
        word if attribute in wanted else f"NO{word}"
        for attribute, word in _WORDS.items()
        if known.get(attribute) != (attribute in wanted)
    ]
    if not options:
        return None
    connection.execute(text(f"{'CREATE' if found is None else 'ALTER'} ROLE {role} {' '.join(options)}"))
    return f"{'made' if found is None else 'corrected'} role {role}: {' '.join(options)}"


def _memberships() -> list[_Step]:
    return [
        _Step(
            f"SELECT NOT pg_has_role('{role}', '{granted}', 'MEMBER')",
            f"GRANT {granted} TO {role}",
            f"made {role} a member of {granted}",
        )
        for role, all_granted in _MEMBERSHIPS.items()
        for granted in all_granted
    ]


def _settings() -> list[_Step]:
    return [
        _Step(
            f"SELECT NOT COALESCE('{name}={value}' = ANY (rolconfig), false)"  # noqa: S608 -- our own
            f" FROM pg_roles WHERE rolname = '{role}'",
            f"ALTER ROLE {role} SET {name} = '{value}'",
            f"set {name} of {role} to {value}",
        )
        for role, settings in _SETTINGS.items()
        for name, value in settings.items()
    ]


def _places(connection: Connection) -> list[_Step]:
    """Who may make objects: the migrator, and nobody in whose schema a function of ours would look."""
    name = connection.execute(text("SELECT current_database()")).scalar_one()
    database = connection.dialect.identifier_preparer.quote_identifier(name)
    return [
        _Step(
            "SELECT has_schema_privilege('public', 'public', 'CREATE')",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            "revoked CREATE on schema public from PUBLIC",
        ),
        _Step(
            "SELECT has_database_privilege('public', current_database(), 'TEMPORARY')",
            f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
            f"revoked TEMPORARY on database {name} from PUBLIC",
        ),
        _Step(
            f"SELECT NOT has_schema_privilege('{MIGRATOR}', 'public', 'CREATE')",
            f"GRANT CREATE, USAGE ON SCHEMA public TO {MIGRATOR}",
            f"granted CREATE on schema public to {MIGRATOR}",
        ),
    ]
