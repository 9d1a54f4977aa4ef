"""``anamorph tenant quota``: how many objects a tenant may have, and how much its models may ask for."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from anamorph.cli.admin import Connection, Tenant, connected
from anamorph.cli.output import AsJson, show_record
from anamorph.wire.admin import TenantQuotaPatch

app = typer.Typer(help="How much a tenant may have.", no_args_is_help=True)

DEFAULT = "default"


@app.command("show")
@connected
def show_quota(connection: Connection, tenant: Tenant, as_json: AsJson = False) -> None:
    """Show a tenant's quota; with its administrator's API key, or the platform's."""
    with connection.keys(tenant, look="anamorph tenant list") as keys:
        show_record(keys.get_quota(tenant), as_json=as_json)


@app.command("set")
@connected
def set_quota(
    connection: Connection,
    tenant: Tenant,
    changes: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE…", help="devices=16 weight=4 tokens_per_s=default …")
    ],
    as_json: AsJson = False,
) -> None:
    """Change fields of a quota: to a whole number, or back to the default; with the platform's API key."""
    patch = patch_of(changes)
    with connection.keys(look=f"anamorph tenant quota show {tenant}") as keys:
        show_record(keys.update_quota(tenant, patch), as_json=as_json)


def patch_of(changes: list[str]) -> TenantQuotaPatch:
    """The message for ``NAME=VALUE`` arguments.

    Raises:
        typer.BadParameter: an unknown name, one given twice, or a value that is no whole number.
    """
    fields: dict[str, int | str | None] = {}
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator or name not in TenantQuotaPatch.model_fields or name in fields:
            known = ", ".join(TenantQuotaPatch.model_fields)
            raise typer.BadParameter(f"{change!r}: write NAME=VALUE, each name once, of {known}")
        fields[name] = None if value == DEFAULT else int(value) if value.isdecimal() else value
    try:
        return TenantQuotaPatch.model_validate(fields)
    except ValidationError as error:
        [first, *_] = error.errors()
        raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']}, or {DEFAULT}") from None
