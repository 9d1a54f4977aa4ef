"""Row security, and what each role of PostgreSQL may do; nothing on SQLite.

The roles are made by ``anamorph-keysvc database setup``, as an administrator.
"""

from __future__ import annotations

from alembic import op

revision = "k003"
down_revision = "k002"
branch_labels = None
depends_on = None

OWNED = (
    "model",
    "key_version",
    "operation",
    "release_grant",
    "usage",
    "api_key",
    "audit",
    "audit_checkpoint",
    "webhook",
    "delivery",
    "answer",
)
SHARED = ("signing_key", "backup")
ABOVE_TENANTS = ("anamorph_platform", "anamorph_worker")
TENANT = "NULLIF(current_setting('anamorph.tenant', true), '')"

# What each role may do to each table; what is not listed is refused.
READ = "SELECT"
ADD = "SELECT, INSERT"
CHANGE = "SELECT, INSERT, UPDATE"
ALL = "SELECT, INSERT, UPDATE, DELETE"
RIGHTS = {
    "anamorph_api": {
        # FOR NO KEY UPDATE, by which writers of one audit chain take turns, needs UPDATE on a column.
        "tenant": "SELECT, UPDATE (id)",
        **dict.fromkeys(("model", "key_version", "operation", "release_grant", "api_key"), CHANGE),
        **dict.fromkeys(("audit", "answer"), ADD),
        **dict.fromkeys(("webhook", "delivery"), ALL),
        **dict.fromkeys(("usage", "audit_checkpoint", "signing_key"), READ),
    },
    "anamorph_platform": {
        "tenant": CHANGE,
        **dict.fromkeys(
            ("model", "key_version", "operation", "release_grant", "usage", "api_key", "webhook", "delivery"),
            CHANGE,
        ),
        **dict.fromkeys(("audit", "answer", "backup"), ADD),
        **dict.fromkeys(("audit_checkpoint", "signing_key", "alembic_version"), READ),
    },
    "anamorph_worker": {
        "tenant": "SELECT, UPDATE (id)",
        **dict.fromkeys(
            ("model", "key_version", "operation", "signing_key", "audit_checkpoint", "webhook"), CHANGE
        ),
        **dict.fromkeys(("release_grant", "usage", "backup"), READ),
        "api_key": "SELECT",
        "audit": ADD,
        "answer": "SELECT, DELETE",
        "delivery": ALL,
    },
}

# The one look at all tenants' credentials, before the caller's tenant is known. It runs as
# the owner of the tables, whom row security does not bind.
FIND = """
CREATE FUNCTION find_credential(wanted text)
RETURNS TABLE (id text, tenant text, role text, model text, version integer, revoked boolean)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT k.id, k.tenant, k.role, NULL, NULL::integer, k.revoked_at IS NOT NULL
        FROM {schema}.api_key AS k WHERE k.hash = wanted
    UNION ALL SELECT g.id, g.tenant, NULL, g.model, g.version, FALSE
        FROM {schema}.release_grant AS g WHERE g.hash = wanted
$$
"""


def _policies(table: str, owner: str) -> None:
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    own = f"USING ({owner} = {TENANT}) WITH CHECK ({owner} = {TENANT})"
    op.execute(f"CREATE POLICY {table}_api ON {table} TO anamorph_api {own}")
    for role in ABOVE_TENANTS:
        name = f"{table}_{role.removeprefix('anamorph_')}"
        op.execute(f"CREATE POLICY {name} ON {table} TO {role} USING (true) WITH CHECK (true)")


def upgrade() -> None:
    """Force row security on every table of tenants, grant each role its rights, make the lookup."""
    bind = op.get_bind()
    if bind.dialect.name != "postgresql":
        return
    schema = bind.exec_driver_sql("SELECT current_schema()").scalar_one()
    _policies("tenant", "id")
    for table in OWNED:
        _policies(table, "tenant")
    for role, rights in RIGHTS.items():
        op.execute(f'GRANT USAGE ON SCHEMA "{schema}" TO {role}')
        for table, what in rights.items():
            op.execute(f"GRANT {what} ON {table} TO {role}")
    op.execute(FIND.format(schema=f'"{schema}"'))
    op.execute("REVOKE ALL ON FUNCTION find_credential(text) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION find_credential(text) TO anamorph_api")


def downgrade() -> None:
    """Drop the lookup, the policies and the rights."""
    bind = op.get_bind()
    if bind.dialect.name != "postgresql":
        return
    schema = bind.exec_driver_sql("SELECT current_schema()").scalar_one()
    op.execute("DROP FUNCTION find_credential(text)")
    for table in ("tenant", *OWNED):
        for role in ("anamorph_api", *ABOVE_TENANTS):
            op.execute(f"DROP POLICY {table}_{role.removeprefix('anamorph_')} ON {table}")
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    for role, rights in RIGHTS.items():
        for table in rights:
            op.execute(f"REVOKE ALL ON {table} FROM {role}")
        op.execute(f'REVOKE ALL ON SCHEMA "{schema}" FROM {role}')
