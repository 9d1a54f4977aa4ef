"""``anamorph key operation``: rotations and other long work, and waiting for its end."""

from __future__ import annotations

import time
from collections.abc import Callable

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from anamorph.cli.admin import AnsweredId, Connection, Tenant, connected
from anamorph.cli.output import AsJson, show_record, show_records
from anamorph.errors import ServiceError, SetupError
from anamorph.wire.admin import OperationRead, OperationStatus
from anamorph.wire.keyservice import KeyService, everything

app = typer.Typer(help="Rotations and other long work of a tenant.", no_args_is_help=True)

_POLL_S = 0.5
_MAX_POLL_S = 3.0


@app.command("list")
@connected
def list_operations(connection: Connection, tenant: Tenant, as_json: AsJson = False) -> None:
    """List a tenant's operations, oldest first."""
    with connection.keys(tenant, look="anamorph tenant list") as keys:
        show_records(
            f"Operations of {tenant}",
            everything(keys.list_operations, tenant),
            ("id", "kind", "model", "version", "status", "phase", "progress", "updated_at", "error"),
            as_json=as_json,
            empty=f"no operations yet; begin a rotation: anamorph key rotate {tenant} MODEL",
        )


@app.command("show")
@connected
def show_operation(
    connection: Connection, tenant: Tenant, operation: AnsweredId, as_json: AsJson = False
) -> None:
    """Show one operation and how far it is."""
    with connection.keys(tenant, look=f"anamorph key operation list {tenant}") as keys:
        show_record(keys.get_operation(tenant, operation), as_json=as_json)


@app.command("cancel")
@connected
def cancel_operation(
    connection: Connection, tenant: Tenant, operation: AnsweredId, as_json: AsJson = False
) -> None:
    """Cancel a rotation that is not active yet; its version becomes FAILED, the old one serves on."""
    with connection.keys(tenant, look=f"anamorph key operation list {tenant}") as keys:
        show_record(keys.cancel_operation(tenant, operation), as_json=as_json)


def wait_for(keys: KeyService, operation: OperationRead, timeout_s: float) -> OperationRead:
    """Poll an operation to its end, with a progress bar on standard error.

    Raises:
        ServiceError: it failed or was cancelled.
        SetupError: it took longer than ``timeout_s`` seconds; it goes on.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(operation.phase, total=1.0)

        def report(now: OperationRead) -> None:
            bar.update(task, description=now.phase, completed=now.progress)

        last = _poll(keys, operation, time.monotonic() + timeout_s, report)
    if last.status is not OperationStatus.SUCCEEDED:
        raise ServiceError(f"the operation {last.id} {last.status.value}: {last.error or 'no reason given'}")
    return last


def _poll(
    keys: KeyService, operation: OperationRead, deadline: float, report: Callable[[OperationRead], None]
) -> OperationRead:
    pause = _POLL_S
    while operation.status is OperationStatus.RUNNING:
        if time.monotonic() > deadline:
            raise SetupError(
                f"still in phase {operation.phase}, and it goes on without us;"
                f" see: anamorph key operation show {operation.tenant} {operation.id}"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, _MAX_POLL_S)
        operation = keys.get_operation(operation.tenant, operation.id)
        report(operation)
    return operation
