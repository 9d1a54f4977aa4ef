"""Beginning, following and cancelling rotations."""

from __future__ import annotations

import base64

from anamorph import errors
from anamorph.keys import TenantKey
from anamorph.wire.admin import OperationRead, OperationStatus
from anamorph.wire.states import State
from anamorph_keysvc.service import lookup
from anamorph_keysvc.service.transition import move, subject, wrong_state
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import IN_FLIGHT, KeyVersion, Model, Operation
from anamorph_keysvc.wrapper import KEY_BYTES, root_context

CANCELLED = "cancelled"


def rotate(work: Work, tenant: str, model: str, reason: str = "requested") -> OperationRead:
    """Issue the next version of a model's key, in PENDING, and the operation that follows it.

    Raises:
        Conflict: a rotation of this model is in flight.
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
    work.record(tenant, "rotate", subject(version), state=version.state.value, reason=reason)
    return lookup.operation_read(_begin(work, version))


def issue(work: Work, model: Model) -> KeyVersion:
    """Draw a root, wrap it for its record, and store it with what can be known of it in public."""
    number = model.last_version + 1
    root = work.entropy(KEY_BYTES)
    key = TenantKey.from_root(root, model.tenant, model.id, number)
    version = KeyVersion(
        tenant=model.tenant,
        model=model.id,
        version=number,
        state=State.PENDING,
        key_id=key.id,
        kcv=key.kcv,
        vocab_kcv=key.vocab_kcv,
        public_key=base64.b64encode(key.public_key()).decode(),
        ciphertext=work.wrapper.wrap(root, root_context(model.tenant, model.id, number)),
        created_at=work.now,
        updated_at=work.now,
    )
    model.last_version = number
    work.session.add_all([model, version])
    work.session.flush()
    return version


def _begin(work: Work, version: KeyVersion) -> Operation:
    operation = Operation(
        id=work.fresh_id("op"),
        tenant=version.tenant,
        model=version.model,
        version=version.version,
        status=OperationStatus.RUNNING,
        phase="pending",
        created_at=work.now,
        updated_at=work.now,
    )
    work.session.add(operation)
    work.session.flush()
    return operation


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
        operation.status, operation.error, operation.updated_at = status, error, work.now
        operation.phase = status.value
        if status is OperationStatus.SUCCEEDED:
            operation.progress = 1.0
        work.session.add(operation)
    return lookup.operation_read(operation)


def cancel(work: Work, tenant: str, operation_id: str) -> OperationRead:
    """Cancel a rotation: its version becomes FAILED. Cancelling again changes nothing.

    Raises:
        Conflict: it has ended otherwise.
    """
    operation = lookup.operation(work.session, tenant, operation_id)
    if operation.status is OperationStatus.CANCELLED:
        return lookup.operation_read(operation)
    version = lookup.version(work.session, tenant, operation.model, operation.version)
    if version.state not in IN_FLIGHT:
        raise wrong_state(version, "cancel")
    move(work, version, State.FAILED, "cancel", failure=CANCELLED)
    return end(work, version, OperationStatus.CANCELLED, CANCELLED)
