"""Versions that say what they were issued under."""

from __future__ import annotations

from typing import Any

from tests.operator.kubernetes.worlds import version

from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.states import State
from anamorph_operator.kubernetes import records
from anamorph_operator.kubernetes.resources.objects import EncryptedModel


class Settings:
    """The fields of a record that may change."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)


class Issued(KeyVersionRead):
    """A version with its settings."""

    settings: Any = None


def issued(of: EncryptedModel, number: int, state: State, **fields: Any) -> Issued:
    """A version that was issued for a resource as it is."""
    known = version(number, state, of, **fields).model_dump(exclude={"settings"})
    return Issued.model_validate({**known, "settings": Settings(records.settings(of))})
