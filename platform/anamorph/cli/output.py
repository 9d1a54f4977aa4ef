"""What commands print: lines for people, or one JSON object for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

Record = TypeVar("Record", bound=BaseModel)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def show(fields: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the fields, one to a line, or as a JSON object."""
    if as_json:
        typer.echo(json.dumps(dict(fields)))
        return
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {value}")


def show_record(record: BaseModel, *, as_json: bool) -> None:
    """Print a message: as it came for programs; for people without what is absent or a long list."""
    if as_json:
        typer.echo(record.model_dump_json())
        return
    show({name: readable(value) for name, value in _flat(record.model_dump())}, as_json=False)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        elif value is not None and not isinstance(value, list | tuple):
            yield f"{prefix}{name}", value


def show_records(
    title: str, records: Iterable[Record], columns: Sequence[str], *, as_json: bool, empty: str
) -> None:
    """Print messages: a table of some columns, or a JSON object with all of everything as ``items``.

    Args:
        title: above the table.
        records: of one type.
        columns: names of fields.
        as_json: print for programs.
        empty: what to say, and to do next, when there are none.
    """
    if as_json:
        typer.echo(json.dumps({"items": [one.model_dump(mode="json") for one in records]}))
        return
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold")
    for one in records:
        table.add_row(*(Text(readable(getattr(one, name))) for name in columns))
    if not table.rows:
        typer.echo(empty)
        return
    # In a pipe nobody's screen limits the width, and folded ids could not be searched for.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def readable(value: Any) -> str:
    """A value on one line: times to the second, nothing for ``None``, nothing that steers a terminal."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    if isinstance(value, Mapping):
        return " ".join(f"{readable(name)}={readable(one)}" for name, one in value.items())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
