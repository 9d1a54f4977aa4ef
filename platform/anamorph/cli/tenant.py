"""``anamorph tenant``: tenants, their API keys and quotas."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from anamorph.cli import quota
from anamorph.cli.admin import AnsweredId, Connection, Tenant, Yes, confirm, connected
from anamorph.cli.output import AsJson, show, show_record, show_records
from anamorph.wire.admin import ApiKeyCreate, Role, TenantCreate
from anamorph.wire.keyservice import everything

app = typer.Typer(help="Tenants and their API keys.", no_args_is_help=True)
api_keys = typer.Typer(help="API keys of a tenant.", no_args_is_help=True)
app.add_typer(api_keys, name="api-key")
app.add_typer(quota.app, name="quota")

_LOOK = "anamorph tenant list"


@app.command()
@connected
def create(
    connection: Connection,
    tenant: Tenant,
    display_name: Annotated[str, typer.Option(help="For people.")] = "",
    as_json: AsJson = False,
) -> None:
    """Create a tenant; with the platform's API key."""
    with connection.keys(look=_LOOK) as keys:
        show_record(keys.create_tenant(TenantCreate(id=tenant, display_name=display_name)), as_json=as_json)


@app.command("list")
@connected
def list_tenants(connection: Connection, as_json: AsJson = False) -> None:
    """List all tenants; with the platform's API key."""
    with connection.keys(look=_LOOK) as keys:
        show_records(
            "Tenants",
            everything(keys.list_tenants),
            ("id", "display_name", "created_at"),
            as_json=as_json,
            empty="no tenants yet; create one: anamorph tenant create TENANT",
        )


@app.command("show")
@connected
def show_tenant(connection: Connection, tenant: Tenant, as_json: AsJson = False) -> None:
    """Show one tenant; with the platform's API key."""
    with connection.keys(look=_LOOK) as keys:
        show_record(keys.get_tenant(tenant), as_json=as_json)


@api_keys.command("create")
@connected
def create_api_key(
    connection: Connection,
    tenant: Tenant,
    name: Annotated[str, typer.Option(help="What the key is for.")],
    role: Annotated[Role, typer.Option(help="What the key may do.")],
    out: Annotated[
        Path | None, typer.Option(help="New 0600 file for the key, which is not printed then.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key. It is shown this once, or written to a file that only its owner can read."""
    with connection.keys(tenant, look=_look(tenant)) as keys, _new_file(out) as descriptor:
        made = keys.create_api_key(tenant, ApiKeyCreate(name=name, role=role))
        if descriptor is not None:
            os.write(descriptor, made.secret.encode("ascii") + b"\n")
    fields = {"id": made.id, "tenant": made.tenant, "name": made.name, "role": made.role.value}
    # Last, so that it is the one line to copy.
    show(fields | ({"secret": made.secret} if out is None else {"file": str(out)}), as_json=as_json)


@contextmanager
def _new_file(path: Path | None) -> Iterator[int | None]:
    """A new private file that is there before the key is made: a key that cannot be kept is not made."""
    if path is None:
        yield None
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@api_keys.command("list")
@connected
def list_api_keys(connection: Connection, tenant: Tenant, as_json: AsJson = False) -> None:
    """List a tenant's API keys, without the keys themselves."""
    with connection.keys(tenant, look=_LOOK) as keys:
        show_records(
            f"API keys of {tenant}",
            everything(keys.list_api_keys, tenant),
            ("id", "name", "role", "created_at", "revoked_at"),
            as_json=as_json,
            empty=f"no API keys yet; make one: anamorph tenant api-key create {tenant} …",
        )


@api_keys.command("revoke")
@connected
def revoke_api_key(
    connection: Connection, tenant: Tenant, key: AnsweredId, yes: Yes = False, as_json: AsJson = False
) -> None:
    """Revoke an API key for good."""
    confirm(f"Whoever uses API key {key} of {tenant} is shut out at once", key, yes=yes)
    with connection.keys(tenant, look=_look(tenant)) as keys:
        show_record(keys.revoke_api_key(tenant, key), as_json=as_json)


def _look(tenant: str) -> str:
    return f"anamorph tenant api-key list {tenant}"
