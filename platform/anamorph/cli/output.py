"""What commands print: lines for people, or one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def show(fields: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the fields, one to a line, or as a JSON object."""
    if as_json:
        typer.echo(json.dumps(dict(fields)))
        return
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {value}")
