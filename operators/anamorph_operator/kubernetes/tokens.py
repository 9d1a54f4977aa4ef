"""Calls that carry a token from a file: the kubelet replaces it, so it is read for each of them."""

from __future__ import annotations

from pathlib import Path

import httpx

from anamorph import errors


class FileBearer(httpx.AsyncBaseTransport):
    """Adds ``Authorization: Bearer`` to each request.

    Args:
        inner: what sends it.
        file: with the token and nothing else.
        remedy: what to do where there is none (yet).
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, file: Path, remedy: str) -> None:
        self._inner = inner
        self._file = file
        self._remedy = remedy

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it with the token that the file holds now.

        Raises:
            Unavailable: there is none.
        """
        request.headers["Authorization"] = f"Bearer {self._token()}"
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()

    def _token(self) -> str:
        try:
            token = self._file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot read a token from {self._file} ({type(error).__name__})"
            raise errors.Unavailable(f"{what}: {self._remedy}") from None
        if not token:
            raise errors.Unavailable(f"no token is in {self._file}: {self._remedy}")
        return token
