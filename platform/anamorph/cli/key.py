"""``anamorph key``: key versions of the key service, and key files on this machine."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anamorph.cli.admin import Connection, Model, Tenant, Version, Yes, confirm, connected
from anamorph.cli.operation import app as operations
from anamorph.cli.operation import wait_for
from anamorph.cli.output import AsJson, show, show_record, show_records
from anamorph.wire.admin import Activation, KeyVersionRead
from anamorph.wire.ids import check_label
from anamorph.wire.keyservice import KeyService, everything

if TYPE_CHECKING:
    from anamorph.keys import TenantKey

app = typer.Typer(help="Key versions of the key service, and key files.", no_args_is_help=True)
app.add_typer(operations, name="operation")

PREPARING = "being prepared"
_COLUMNS = (
    "version",
    "state",
    "key_id",
    "activated_at",
    "drain_until",
    "destroy_at",
    "served_tokens",
    "failure",
)


@app.command()
def generate(
    tenant: str,
    model: str,
    version: int,
    out: Annotated[Path, typer.Option("--out", help="New file, readable by its owner only.")],
    as_json: AsJson = False,
) -> None:
    """Draw a random key and save it; an existing file is never overwritten. Needs no key service."""
    from anamorph.keys import TenantKey

    key = TenantKey.generate(tenant, model, version)
    key.save(out)
    show(_public(key), as_json=as_json)


@app.command("show")
@connected
def show_key(
    connection: Connection,
    place: Annotated[str, typer.Argument(metavar="FILE|TENANT", help="A key file, alone; or tenant id.")],
    model: Annotated[str | None, typer.Argument(help="Model id.")] = None,
    version: Annotated[int | None, typer.Argument(min=1, help="Number of the key version.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is public about a key file, or about a key version of the key service."""
    if model is None:
        from anamorph.keys import TenantKey

        show(_public(TenantKey.load(Path(place))), as_json=as_json)
        return
    if version is None:
        raise typer.BadParameter("name a key file, or tenant, model and version")
    at = (check_label(place), check_label(model), version)
    with connection.keys(place, look=_look(*at)) as keys:
        _show_version(keys.get_version(*at), as_json=as_json)


def _public(key: TenantKey) -> dict[str, Any]:
    return {
        "key_id": key.id,
        "kcv": key.kcv,
        "vocab_kcv": key.vocab_kcv,
        "public_key": b64encode(key.public_key()).decode("ascii"),
    }


def _prepared(version: KeyVersionRead) -> KeyVersionRead:
    """The version as people see it: one without a key id yet says why."""
    return version if version.key_id else version.model_copy(update={"key_id": PREPARING})


def _show_version(version: KeyVersionRead, *, as_json: bool) -> None:
    show_record(version if as_json else _prepared(version), as_json=as_json)


def _look(tenant: str, model: str, _version: int = 0) -> str:
    return f"anamorph key list {tenant} {model}"


@app.command("list")
@connected
def list_versions(connection: Connection, tenant: Tenant, model: Model, as_json: AsJson = False) -> None:
    """List a model's key versions, oldest first."""
    with connection.keys(tenant, look=f"anamorph model list {tenant}") as keys:
        versions = everything(keys.list_versions, tenant, model)
        show_records(
            f"Key versions of {tenant}/{model}",
            versions if as_json else map(_prepared, versions),
            _COLUMNS,
            as_json=as_json,
            empty=f"no key versions yet; make the first: anamorph key rotate {tenant} {model}",
        )


@app.command()
@connected
def rotate(
    connection: Connection,
    tenant: Tenant,
    model: Model,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end; exit 1 if it fails.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait at most.")] = 3600,
    as_json: AsJson = False,
) -> None:
    """Begin a rotation: a new key version, which replaces the active one once its replica is verified."""
    look = f"anamorph key operation list {tenant}"
    with connection.keys(tenant, look=look) as keys:
        begun = keys.rotate(tenant, model)
        operation = wait_for(keys, begun, timeout) if wait else begun
    show_record(operation, as_json=as_json)
    if not (wait or as_json):
        typer.echo(f"follow it: anamorph key operation show {tenant} {operation.id}", err=True)


@app.command()
@connected
def activate(
    connection: Connection,
    tenant: Tenant,
    model: Model,
    version: Version,
    endpoint: Annotated[str, typer.Option(help="URL that serves the verified replica.")],
    as_json: AsJson = False,
) -> None:
    """STAGED to ACTIVE by hand, which the operator does by itself; the version before drains."""
    at = (tenant, model, version)
    _do(connection, at, lambda keys: keys.activate(*at, Activation(endpoint=endpoint)), as_json=as_json)


@app.command()
@connected
def suspend(
    connection: Connection, tenant: Tenant, model: Model, version: Version, as_json: AsJson = False
) -> None:
    """Stop serving and releasing a version for now; `resume` takes it back."""
    at = (tenant, model, version)
    _do(connection, at, lambda keys: keys.suspend(*at), as_json=as_json)


@app.command()
@connected
def resume(
    connection: Connection, tenant: Tenant, model: Model, version: Version, as_json: AsJson = False
) -> None:
    """Bring a suspended version back to the state before."""
    at = (tenant, model, version)
    _do(connection, at, lambda keys: keys.resume(*at), as_json=as_json)


@app.command()
@connected
def revoke(
    connection: Connection,
    tenant: Tenant,
    model: Model,
    version: Version,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Mark a version compromised: nothing is served or released under it, and it never comes back."""
    at = (tenant, model, version)
    warning = f"{_name(*at)} stops serving within seconds and never comes back"
    confirm(warning, _name(*at), yes=yes)
    _do(connection, at, lambda keys: keys.revoke(*at), as_json=as_json)


@app.command()
@connected
def destroy(
    connection: Connection,
    tenant: Tenant,
    model: Model,
    version: Version,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Schedule the destruction of a version that is retired, failed or compromised."""
    at = (tenant, model, version)
    warning = f"{_name(*at)} is erased after the policy's delay; what was retired can be restored until then"
    confirm(warning, _name(*at), yes=yes)
    _do(connection, at, lambda keys: keys.destroy(*at), as_json=as_json)


@app.command()
@connected
def restore(
    connection: Connection, tenant: Tenant, model: Model, version: Version, as_json: AsJson = False
) -> None:
    """Take back a scheduled destruction; never of what was compromised or has failed."""
    at = (tenant, model, version)
    _do(connection, at, lambda keys: keys.restore(*at), as_json=as_json)


def _name(tenant: str, model: str, version: int) -> str:
    return f"{tenant}/{model}/v{version}"


def _do(
    connection: Connection,
    at: tuple[str, str, int],
    change: Callable[[KeyService], KeyVersionRead],
    *,
    as_json: bool,
) -> None:
    with connection.keys(at[0], look=_look(*at)) as keys:
        _show_version(change(keys), as_json=as_json)
