"""The one place where the state of a key version changes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update
from sqlmodel import col

from anamorph import errors
from anamorph.wire.states import TRANSITIONS, State
from anamorph_keysvc.service import webhooks
from anamorph_keysvc.service.lookup import Releasable
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import IN_FLIGHT, KeyVersion, Model

# Phases of a rotation, in order: without a key yet, with one, and then as the states.
PHASES = ("pending", "prepared", "materializing", "staged")
_ONWARD = frozenset({State.MATERIALIZING, State.STAGED, State.ACTIVE})


def phase_of(state: State, *, prepared: bool) -> str:
    """The phase of a rotation whose version is in ``state``; ``prepared``: it has its key."""
    return "prepared" if state is State.PENDING and prepared else state.value.lower()


def move(
    work: Work,
    row: KeyVersion,
    to: State,
    action: str,
    *,
    detail: dict[str, str | int | None] | None = None,
    **changes: Any,
) -> None:
    """Move a version to another state, with its one audit row, in this transaction.

    ``row`` is the version as this transaction read it, and is refreshed; ``action`` is
    the audit log's word for it; ``changes`` are further columns to set.

    Raises:
        Conflict: no such transition, or another transaction changed the row first.
    """
    origin = row.state
    if to not in TRANSITIONS[origin]:
        raise wrong_state(row, action)
    change(work, row, state=to, **changes)
    webhooks.enqueue(work, row, webhooks.event_of(origin, to))
    more = detail or {}
    work.record(row.tenant, action, subject(row), origin=origin.value, state=to.value, **more)


def change(work: Work, row: KeyVersion, **changes: Any) -> None:
    """Compare-and-set on ``row_version``.

    Raises:
        Conflict: another transaction changed the row first.
    """
    statement = (
        update(KeyVersion)
        .where(
            col(KeyVersion.tenant) == row.tenant,
            col(KeyVersion.model) == row.model,
            col(KeyVersion.version) == row.version,
            col(KeyVersion.row_version) == row.row_version,
        )
        .values(row_version=row.row_version + 1, updated_at=work.now, **changes)
        .execution_options(synchronize_session=False)
    )
    if work.session.exec(statement).rowcount != 1:
        raise errors.Conflict("the key version changed meanwhile: read it again", code="conflict")
    if row.state in IN_FLIGHT and (changes.get("state") in _ONWARD or "key_id" in changes):
        took = (work.now - row.updated_at).total_seconds()
        work.phases.append((phase_of(row.state, prepared=row.key_id is not None), took))
    work.session.refresh(row)


def require(row: KeyVersion | Model, expected: int | None) -> None:
    """Check an If-Match.

    Raises:
        PreconditionFailed: the row is no longer the one that the caller read.
    """
    if expected is not None and row.row_version != expected:
        what = "model" if isinstance(row, Model) else "key version"
        raise errors.PreconditionFailed(
            f"the {what} changed since you read it: read it again", code="precondition_failed"
        )


def subject(row: KeyVersion | Releasable) -> str:
    """How the audit log names a version."""
    return f"{row.model}/keys/{row.version}"


def wrong_state(row: KeyVersion | Releasable, action: str) -> errors.Conflict:
    """The refusal of an action that the version's state does not admit."""
    return errors.Conflict(f"a version in {row.state} does not admit '{action}'", code="wrong_state")
