"""What a token says of itself before anybody has verified it: good for choosing who verifies, no more."""

from __future__ import annotations

import re
from typing import Any

import jwt

from anamorph import errors

MOST_BYTES = 8192
_COMPACT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)


def claims(token: str) -> dict[str, Any]:
    """The claims of a signed token, unverified.

    Raises:
        Unauthenticated: too large, or not a signed JWT in its compact form.
    """
    if len(token) > MOST_BYTES or not _COMPACT.fullmatch(token):
        raise refused()
    try:
        found: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError:
        raise refused() from None
    return found


def refused() -> errors.Unauthenticated:
    """The one answer to every credential that is not accepted, whatever is wrong with it."""
    return errors.Unauthenticated(
        "send 'Authorization: Bearer' with a valid credential", code="unauthenticated"
    )
