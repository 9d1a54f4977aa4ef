"""Triggers that keep what a CHECK cannot, because it does not see the row as it was."""

from __future__ import annotations

from alembic import op

revision = "k002"
down_revision = "k001"
branch_labels = None
depends_on = None

MOVES = {
    "PENDING": ("MATERIALIZING", "FAILED", "COMPROMISED"),
    "MATERIALIZING": ("STAGED", "FAILED", "COMPROMISED"),
    "STAGED": ("ACTIVE", "FAILED", "COMPROMISED"),
    "ACTIVE": ("DRAINING", "SUSPENDED", "COMPROMISED"),
    "DRAINING": ("RETIRED", "SUSPENDED", "COMPROMISED"),
    "SUSPENDED": ("ACTIVE", "DRAINING", "COMPROMISED"),
    "RETIRED": ("DESTROY_SCHEDULED", "COMPROMISED"),
    "COMPROMISED": ("DESTROY_SCHEDULED",),
    "FAILED": ("DESTROY_SCHEDULED",),
    "DESTROY_SCHEDULED": ("RETIRED", "DESTROYED"),
}
PLACE = ("tenant", "model", "version", "created_at")
IDENTITY = ("key_id", "kcv", "vocab_kcv", "public_key")
DEADLINES = ("drain_until", "destroy_at")


def _moves() -> str:
    allowed = " OR ".join(
        f"(OLD.state = '{old}' AND NEW.state IN ({', '.join(repr(new) for new in news)}))"
        for old, news in MOVES.items()
    )
    return f"NEW.state <> OLD.state AND NOT ({allowed})"


def _first_state() -> str:
    return "NEW.state <> 'PENDING' OR NEW.row_version <> 1"


def _changed_place() -> str:
    return " OR ".join(f"NEW.{name} <> OLD.{name}" for name in PLACE)


def _changed_identity() -> str:
    """A key is given once, in PENDING."""
    given = "OLD.key_id IS NULL AND NEW.key_id IS NOT NULL AND OLD.state <> 'PENDING'"
    changed = " OR ".join(f"NEW.{name} IS NULL OR NEW.{name} <> OLD.{name}" for name in IDENTITY)
    return f"({given}) OR (OLD.key_id IS NOT NULL AND ({changed}))"


def _earlier_deadline() -> str:
    return " OR ".join(
        f"(OLD.{name} IS NOT NULL AND (NEW.{name} IS NULL OR NEW.{name} < OLD.{name}))" for name in DEADLINES
    )


def _false_return() -> str:
    restored = "OLD.state = 'DESTROY_SCHEDULED' AND NEW.state = 'RETIRED' AND OLD.previous_state <> 'RETIRED'"
    resumed = (
        "OLD.state = 'SUSPENDED' AND NEW.state IN ('ACTIVE', 'DRAINING') AND OLD.previous_state <> NEW.state"
    )
    return f"({restored}) OR ({resumed})"


def _erased_root() -> str:
    """Erased when DESTROYED, and neither before nor undone."""
    undone = "OLD.ciphertext IS NULL AND NEW.ciphertext IS NOT NULL AND OLD.state <> 'PENDING'"
    early = "OLD.ciphertext IS NOT NULL AND NEW.ciphertext IS NULL AND NEW.state <> 'DESTROYED'"
    return f"({undone}) OR ({early})"


def _old_number() -> str:
    highest = "SELECT MAX(version) FROM key_version WHERE tenant = NEW.tenant AND model = NEW.model"
    return f"NEW.version <= COALESCE(({highest}), 0)"


def _triggers() -> dict[str, tuple[str, str, str]]:
    """Name: event, condition, message."""
    update, insert = "UPDATE ON key_version", "INSERT ON key_version"
    audit = "the audit log is only ever added to"
    return {
        "key_version_moves": (update, _moves(), "no such transition"),
        "key_version_first_state": (insert, _first_state(), "a version begins in PENDING"),
        "key_version_return": (update, _false_return(), "a version returns only to where it was"),
        "key_version_row_version": (
            update,
            "NEW.row_version <> OLD.row_version + 1",
            "row_version counts every change",
        ),
        "key_version_deadlines": (update, _earlier_deadline(), "deadlines only move forward"),
        "key_version_place": (update, _changed_place(), "a key version stays where it is"),
        "key_version_identity": (update, _changed_identity(), "a key version keeps its identity"),
        "key_version_root": (update, _erased_root(), "a key is erased once, and only when destroyed"),
        "key_version_number": (insert, _old_number(), "version numbers only grow"),
        "key_version_kept": ("DELETE ON key_version", "1 = 1", "key versions are never deleted"),
        "model_last_version": (
            "UPDATE ON model",
            "NEW.last_version < OLD.last_version",
            "version numbers only grow",
        ),
        "audit_kept": ("DELETE ON audit", "1 = 1", audit),
        "audit_unchanged": ("UPDATE ON audit", "1 = 1", audit),
    }


# Raises what it is given, as the class of errors that constraints raise too.
_REFUSE = """
CREATE FUNCTION anamorph_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
END $$
"""
# PostgreSQL's WHEN takes no subquery.
_NUMBER = """
CREATE FUNCTION anamorph_version_number() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF {condition} THEN
        RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$
"""


def _on_sqlite(name: str, event: str, condition: str, message: str) -> str:
    body = f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
    return f"CREATE TRIGGER {name} BEFORE {event} WHEN {condition} {body}"


def _on_postgresql(name: str, event: str, condition: str, message: str) -> str:
    if condition == _old_number():
        return (
            f"CREATE TRIGGER {name} BEFORE {event} FOR EACH ROW"
            f" EXECUTE FUNCTION anamorph_version_number('{message}')"
        )
    return (
        f"CREATE TRIGGER {name} BEFORE {event} FOR EACH ROW WHEN ({condition})"
        f" EXECUTE FUNCTION anamorph_refuse('{message}')"
    )


def upgrade() -> None:
    """Create the triggers, and on PostgreSQL the functions that they call."""
    postgresql = op.get_bind().dialect.name == "postgresql"
    if postgresql:
        op.execute(_REFUSE)
        op.execute(_NUMBER.format(condition=_old_number()))
    statement = _on_postgresql if postgresql else _on_sqlite
    for name, rule in _triggers().items():
        op.execute(statement(name, *rule))


def downgrade() -> None:
    """Drop them."""
    postgresql = op.get_bind().dialect.name == "postgresql"
    for name, (event, _, _) in _triggers().items():
        table = event.rpartition(" ")[2]
        op.execute(f"DROP TRIGGER {name} ON {table}" if postgresql else f"DROP TRIGGER {name}")
    if postgresql:
        op.execute("DROP FUNCTION anamorph_refuse()")
        op.execute("DROP FUNCTION anamorph_version_number()")
