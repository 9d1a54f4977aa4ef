"""Tokens that lie in files which the kubelet replaces, so that each call reads its file anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from anamorph import errors


def token_in(file: Path, remedy: str) -> Callable[[], str]:
    """What reads the token that a file holds now, for ``wire.credential``.

    Args:
        file: with the token and nothing else.
        remedy: what to do where there is none (yet).

    Returns:
        It raises ``Unavailable`` where there is none.
    """

    def current() -> str:
        try:
            token = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot read a token from {file} ({type(error).__name__})"
            raise errors.Unavailable(f"{what}: {remedy}") from None
        if not token:
            raise errors.Unavailable(f"no token is in {file}: {remedy}")
        return token

    return current
