"""Beginning, following and cancelling rotations."""

from __future__ import annotations

from anamorph import errors
from anamorph.wire.admin import OperationRead, OperationStatus, RotationRead
from anamorph.wire.states import State
from anamorph_keysvc.service import lookup, quotas, steps, webhooks
from anamorph_keysvc.service.transition import move, subject, wrong_state
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import IN_FLIGHT, KeyVersion, Model

CANCELLED = "cancelled"


def rotate(work: Work, tenant: str, model: str, reason: str = "requested") -> RotationRead:
    """Issue the next version of a model's key, in PENDING, and the operation that follows it.

    Raises:
        Conflict: a rotation of this model is in flight, or the tenant has too many versions.
    """
    row = lookup.model(work.session, tenant, model)
    running = lookup.in_states(work.session, row, *IN_FLIGHT)
    if running is not None:
        raise errors.Conflict(
            f"version {running.version} of '{model}' is {running.state}: wait for operation "
            f"{lookup.operation_of(work.session, running).id} or cancel it",
            code="rotation_in_flight",
        )
    version = issue(work, row)
    webhooks.enqueue(work, version, webhooks.event_of(None, version.state))
    work.record(tenant, "rotate", subject(version), state=version.state.value, reason=reason)
    operation = steps.begin(work, "rotate", "pending", version.tenant, version.model, version.version)
    quotas.check(work, tenant, "versions")
    return RotationRead(**lookup.operation_read(operation).model_dump())


def issue(work: Work, model: Model) -> KeyVersion:
    """Give out the next version number. The version has no key yet: ``preparation`` draws it."""
    number = model.last_version + 1
    version = KeyVersion(
        tenant=model.tenant,
        model=model.id,
        version=number,
        state=State.PENDING,
        created_at=work.now,
        updated_at=work.now,
        settings=lookup.settings_of(model),
    )
    model.last_version = number
    work.session.add_all([model, version])
    work.session.flush()
    return version


def follow(work: Work, version: KeyVersion, phase: str, progress: float) -> OperationRead:
    """Note how far the rotation of ``version`` is."""
    operation = lookup.operation_of(work.session, version)
    operation.phase, operation.progress, operation.updated_at = phase, progress, work.now
    work.session.add(operation)
    return lookup.operation_read(operation)


def end(work: Work, version: KeyVersion, status: OperationStatus, error: str | None = None) -> OperationRead:
    """End the rotation of ``version`` if it is still running."""
    operation = lookup.operation_of(work.session, version)
    if operation.status is OperationStatus.RUNNING:
        steps.end(work, operation, status, error)
    return lookup.operation_read(operation)


def cancel(work: Work, tenant: str, operation_id: str) -> OperationRead:
    """Cancel a rotation: its version becomes FAILED. Cancelling again changes nothing.

    Raises:
        Conflict: it has ended otherwise.
    """
    # Only looked at: who holds a version may wait for its operation, so nobody does the reverse.
    operation = lookup.operation(work.session, tenant, operation_id, lock=False)
    if operation.model is None or operation.version is None:
        raise errors.Conflict("shredding cannot be cancelled: its keys are destroyed", code="wrong_state")
    version = lookup.version(work.session, tenant, operation.model, operation.version)
    work.session.refresh(operation)
    if operation.status is OperationStatus.CANCELLED:
        return lookup.operation_read(operation)
    if version.state not in IN_FLIGHT:
        raise wrong_state(version, "cancel")
    move(work, version, State.FAILED, "cancel", failure=CANCELLED)
    return end(work, version, OperationStatus.CANCELLED, CANCELLED)
