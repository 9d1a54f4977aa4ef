"""``NAME=VALUE`` arguments: the fields of a record that a command changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    fields: dict[str, Any] = {}
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator or name not in kind.model_fields or name in fields:
            known = ", ".join(kind.model_fields)
            raise typer.BadParameter(f"{change!r}: write NAME=VALUE, each name once, of {known}")
        fields[name] = read(name, value)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        [first, *_] = error.errors()
        raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']}{otherwise}") from None
