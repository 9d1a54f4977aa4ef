"""What a caller shows the key service; it may be replaced while the caller lives.

Kubernetes puts a pod's projected token into a file, lets it live for minutes, and writes the
next one over it well before it ends. So a file is read anew for each request, and for each
attempt of one: there is nothing to watch, and no answer 401 to wait for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from pathlib import Path

import httpx

from anamorph.errors import SetupError

Credential = str | Path | Callable[[], str]
"""An API key, grant or token; the file that holds it; or what answers it at the time."""

MOST_BYTES = 16 * 1024
TOKEN = re.compile(rb"[!-~]{8,%d}" % MOST_BYTES)
"""What a credential is made of. A token with the groups of its holder is longer than any key of ours."""


class Bearer(httpx.Auth):
    """Puts the credential as it is now on each request.

    Args:
        current: answers it; must not wait for long, as async callers wait with it.
    """

    def __init__(self, current: Callable[[], str]) -> None:
        self._current = current

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Set the header."""
        request.headers["Authorization"] = f"Bearer {self._current()}"
        yield request


def bearer(credential: Credential | None) -> Bearer | None:
    """How requests show a credential; nothing without one."""
    if not credential:
        return None
    if isinstance(credential, str):
        return Bearer(lambda: credential)
    if isinstance(credential, Path):
        return Bearer(lambda: read_credential(credential))
    return Bearer(credential)


def read_credential(path: Path) -> str:
    """The credential in a file, without white space around it.

    Raises:
        SetupError: the file cannot be read, or holds none.
    """
    try:
        with path.open("rb") as file:
            found = file.read(MOST_BYTES + 2).strip()
    except OSError as error:
        raise SetupError(f"cannot read a credential from {path}: {error.strerror}") from None
    if not TOKEN.fullmatch(found):
        raise SetupError(f"{path} holds no credential: an API key, or a token, on one line")
    return found.decode("ascii")
