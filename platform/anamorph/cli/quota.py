"""``anamorph tenant quota``: how many objects a tenant may have, and how much its models may ask for."""

from __future__ import annotations

from typing import Annotated

import typer

from anamorph.cli.admin import Connection, Tenant, connected
from anamorph.cli.changes import patch_of
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
    patch = patch_of(TenantQuotaPatch, changes, read_value, f", or {DEFAULT}")
    with connection.keys(look=f"anamorph tenant quota show {tenant}") as keys:
        show_record(keys.update_quota(tenant, patch), as_json=as_json)


def read_value(_name: str, text: str) -> int | str | None:
    """The value of a field: a whole number, nothing for the default, or the text as it is."""
    if text == DEFAULT:
        return None
    return int(text) if text.isdecimal() else text  # the message's own check says what is wrong with it
