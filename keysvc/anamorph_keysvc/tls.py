"""HTTPS of the service itself: a certificate that somebody else renews while the service runs."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import uvicorn

from anamorph.errors import SetupError

_log = logging.getLogger(__name__)

REFRESH_S = 60
"""Seconds between two looks at the files."""


class Certificate:
    """A certificate and its key in files, loaded again when they have changed.

    Raises:
        SetupError: a file is missing, or they do not belong together.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            self._loaded = self._content()
            self._context.load_cert_chain(chain, key)
        except OSError as error:  # an ssl.SSLError is one, too
            raise SetupError(
                f"{chain} and {key} are no certificate with its key, in PEM ({type(error).__name__})"
            ) from None

    def serve(self, config: uvicorn.Config) -> None:
        """Have a server use the certificate, and look after it from time to time."""
        config.load()
        config.ssl = self._context
        config.callback_notify = self._notify
        config.timeout_notify = REFRESH_S

    def refresh(self) -> bool:
        """Load what has changed; new connections use it. Whether anything has been loaded.

        Files that do not fit, such as those that are just being replaced, change nothing.
        """
        try:
            content = self._content()
            if content == self._loaded:
                return False
            # On the side first: a context that takes half of it would serve nobody.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)
            self._context.load_cert_chain(self._chain, self._key)
        except OSError as error:
            _log.warning("the certificate in %s cannot be loaded: %s", self._chain, type(error).__name__)
            return False
        self._loaded = content
        _log.info("a new certificate is in use")
        return True

    async def _notify(self) -> None:
        self.refresh()

    def _content(self) -> bytes:
        # Of the certificate alone: a new key comes with a new one, and no key is kept here.
        return self._chain.read_bytes()


def opened(chain: Path | None, key: Path | None) -> Certificate | None:
    """The certificate of a command line; none where none is named.

    Raises:
        SetupError: one of the two is missing, or they do not belong together.
    """
    if (chain is None) != (key is None):
        raise SetupError("name both --tls-cert-file and --tls-key-file, or neither")
    return None if chain is None or key is None else Certificate(chain, key)
