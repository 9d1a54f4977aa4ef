"""``NAME=VALUE`` arguments: the fields of a record that a command changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import typer
from pydantic import ValidationError

from anamorph.wire.admin import Message

Patch = TypeVar("Patch", bound=Message)


def patch_of(
    kind: type[Patch], changes: Sequence[str], read: Callable[[str, str], Any], otherwise: str = ""
) -> Patch:
    """The message for ``NAME=VALUE`` arguments.

    Args:
        kind: of the message.
        changes: the arguments.
        read: the value of a field, from its name and text; the message's own check judges it.
        otherwise: what else a field could be, added to the message's complaint.

    Raises:
        typer.BadParameter: an unknown name, one given twice, or a value that is none.
    """
    return checked(kind, read_all(kind.model_fields, changes, read), otherwise)


def read_all(
    names: Collection[str], changes: Sequence[str], read: Callable[[str, str], Any]
) -> dict[str, Any]:
    """The fields that ``NAME=VALUE`` arguments give, each of ``names`` at most once.

    Raises:
        typer.BadParameter: an unknown name, or one given twice.
    """
    fields: dict[str, Any] = {}
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator or name not in names or name in fields:
            raise typer.BadParameter(f"{change!r}: write NAME=VALUE, each name once, of {', '.join(names)}")
        fields[name] = read(name, value)
    return fields


def checked(kind: type[Patch], fields: Mapping[str, Any], otherwise: str = "") -> Patch:
    """The message with these fields.

    Raises:
        typer.BadParameter: a value is none; said by the innermost field's name.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        [first, *_] = error.errors()
        # Behind the field pydantic may name the kind of value that it tried.
        given = [name for name in first["loc"] if name in set(_names(fields))]
        place = "".join(f"{name}: " for name in given[-1:])
        raise typer.BadParameter(f"{place}{first['msg']}{otherwise}") from None


def _names(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        yield name
        if isinstance(value, Mapping):
            yield from _names(value)
