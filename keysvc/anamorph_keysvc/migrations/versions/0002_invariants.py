"""Triggers that keep what a CHECK cannot, because it does not see the row as it was."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
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
IDENTITY = ("tenant", "model", "version", "key_id", "kcv", "vocab_kcv", "public_key", "created_at")
DEADLINES = ("drain_until", "destroy_at")


def _moves() -> str:
    allowed = " OR ".join(
        f"(OLD.state = '{old}' AND NEW.state IN ({', '.join(repr(new) for new in news)}))"
        for old, news in MOVES.items()
    )
    return f"NEW.state <> OLD.state AND NOT ({allowed})"


def _first_state() -> str:
    return "NEW.state <> 'PENDING' OR NEW.row_version <> 1"


def _changed_identity() -> str:
    return " OR ".join(f"NEW.{name} IS NOT OLD.{name}" for name in IDENTITY)


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


def _changed_root() -> str:
    return "NEW.ciphertext IS NOT OLD.ciphertext AND OLD.ciphertext IS NULL AND OLD.state <> 'PENDING'"


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
        "key_version_identity": (update, _changed_identity(), "a key version keeps its identity"),
        "key_version_root": (update, _changed_root(), "an erased key stays erased"),
        "key_version_number": (insert, _old_number(), "version numbers only grow"),
        "key_version_kept": ("DELETE ON key_version", "1", "key versions are never deleted"),
        "model_last_version": (
            "UPDATE ON model",
            "NEW.last_version < OLD.last_version",
            "version numbers only grow",
        ),
        "audit_kept": ("DELETE ON audit", "1", audit),
        "audit_unchanged": ("UPDATE ON audit", "1", audit),
    }


def _sqlite_only() -> None:
    if op.get_bind().dialect.name != "sqlite":
        raise NotImplementedError("these triggers are written for SQLite only so far")


def upgrade() -> None:
    """Create the triggers."""
    _sqlite_only()
    for name, (event, condition, message) in _triggers().items():
        body = f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
        op.execute(sa.text(f"CREATE TRIGGER {name} BEFORE {event} WHEN {condition} {body}"))


def downgrade() -> None:
    """Drop the triggers."""
    _sqlite_only()
    for name in _triggers():
        op.execute(sa.text(f"DROP TRIGGER {name}"))
