"""``anamorph policy``: when a model's keys are rotated, and how long old ones linger."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Annotated, Any

import typer

from anamorph.cli.admin import Connection, Model, Tenant, connected
from anamorph.cli.changes import patch_of
from anamorph.cli.output import AsJson, show_record
from anamorph.wire.admin import RotationPolicyPatch

app = typer.Typer(help="When keys are rotated, and how long old ones linger.", no_args_is_help=True)

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(?P<count>\d{1,12})(?P<unit>[smhd]?)")
OFF = "off"


@app.command("show")
@connected
def show_policy(connection: Connection, tenant: Tenant, model: Model, as_json: AsJson = False) -> None:
    """Show a model's rotation policy; durations are in seconds."""
    with connection.keys(tenant, look=f"anamorph model list {tenant}") as keys:
        show_record(keys.get_policy(tenant, model), as_json=as_json)


@app.command("set")
@connected
def set_policy(
    connection: Connection,
    tenant: Tenant,
    model: Model,
    changes: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE…", help="period_s=30d token_budget=off grace_s=20m …")
    ],
    as_json: AsJson = False,
) -> None:
    """Change fields of a rotation policy: to a number, a duration such as 90s, 15m, 12h, 30d, or off."""
    patch = patch_of(RotationPolicyPatch, changes, read_value)
    with connection.keys(tenant, look=f"anamorph policy show {tenant} {model}") as keys:
        show_record(keys.update_policy(tenant, model, patch), as_json=as_json)


def read_value(name: str, text: str) -> Any:
    """The value of a field: a number, a duration where the name ends in ``_s``, or the text as it is."""
    if text == OFF:
        return None
    found = _DURATION.fullmatch(text)
    if name.endswith("_s") and found is not None:
        return int(found["count"]) * _UNITS[found["unit"]]
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text  # the message's own check says what is wrong with it
