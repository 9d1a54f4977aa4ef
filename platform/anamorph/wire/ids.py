"""Identifiers that cross the network, and their grammar.

Tenant and model ids are DNS labels. A key id is ``tenant.model.vN.kcv``: labels
hold no dot, so it parses in one way only (transforms.md §4).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from anamorph.errors import InvalidId

LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_LABEL = re.compile(LABEL)
_KEY_ID = re.compile(
    rf"(?P<tenant>{LABEL})\.(?P<model>{LABEL})\.v(?P<version>[1-9][0-9]{{0,8}})\.(?P<kcv>[0-9a-f]{{16}})"
)

# Names that the system itself uses as the first part of a route.
RESERVED = frozenset({"plaintext", "v1", "healthz", "metrics", "livez", "readyz", "docs"})


def check_label(value: str) -> str:
    """Return ``value`` if it is a valid tenant or model id.

    Raises:
        InvalidId: not a lower-case DNS label of at most 63 characters, or reserved.
    """
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise InvalidId("an id is 1 to 63 of a-z, 0-9 and '-', and starts and ends with a letter or digit")
    if value in RESERVED:
        raise InvalidId(f"'{value}' is reserved; choose another id")
    return value


def _label_for_pydantic(value: str) -> str:
    try:
        return check_label(value)
    except InvalidId as error:
        raise ValueError(str(error)) from error


Label = Annotated[
    str,
    AfterValidator(_label_for_pydantic),
    WithJsonSchema({"type": "string", "maxLength": 63, "pattern": f"^{LABEL}$"}),
]


@dataclass(frozen=True)
class KeyId:
    """``tenant.model.vN.kcv`` taken apart; ``str()`` puts it together again."""

    tenant: str
    model: str
    version: int
    kcv: str

    def __str__(self) -> str:
        return f"{self.tenant}.{self.model}.v{self.version}.{self.kcv}"

    @classmethod
    def parse(cls, text: str) -> KeyId:
        """Parse a key id.

        Raises:
            InvalidId: ``text`` is not ``tenant.model.vN.kcv``.
        """
        match = _KEY_ID.fullmatch(text) if isinstance(text, str) and len(text) <= 160 else None
        if match is None:
            raise InvalidId("a key id reads tenant.model.vN.kcv, with 16 hexadecimal digits at the end")
        return cls(match["tenant"], match["model"], int(match["version"]), match["kcv"])
