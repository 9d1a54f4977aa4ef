"""How an operation begins and ends, whatever its kind."""

from __future__ import annotations

from anamorph.wire.admin import OperationStatus
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import Operation


def begin(
    work: Work, kind: str, phase: str, tenant: str, model: str | None = None, version: int | None = None
) -> Operation:
    """A running operation, whose next step is the worker's, at once."""
    operation = Operation(
        id=work.fresh_id("op"),
        kind=kind,
        tenant=tenant,
        model=model,
        version=version,
        status=OperationStatus.RUNNING,
        phase=phase,
        created_at=work.now,
        updated_at=work.now,
        next_attempt_at=work.now,
    )
    work.session.add(operation)
    work.session.flush()
    return operation


def end(work: Work, operation: Operation, status: OperationStatus, error: str | None = None) -> None:
    """End an operation, and whoever's lease on it."""
    operation.status, operation.error, operation.updated_at = status, error, work.now
    operation.phase = status.value
    operation.next_attempt_at = operation.leased_by = operation.leased_until = None
    if status is OperationStatus.SUCCEEDED:
        operation.progress = 1.0
    work.session.add(operation)
