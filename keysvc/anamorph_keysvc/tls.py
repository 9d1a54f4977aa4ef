"""HTTPS of the service itself: a certificate that somebody else renews while the service runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import uvicorn

from anamorph.errors import SetupError
from anamorph.wire.certificate import REFRESH_S, CertificateFiles


class Certificate:
    """A certificate and its key in files, loaded again when they have changed.

    Raises:
        SetupError: a file is missing, or they do not belong together.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            self._files = CertificateFiles(chain, key)
            self._files.load(self._context)
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
        """Load what has changed; new connections use it. Whether anything has been loaded."""
        return self._files.renew(self._context)

    async def _notify(self) -> None:
        self.refresh()


def opened(chain: Path | None, key: Path | None) -> Certificate | None:
    """The certificate of a command line; none where none is named.

    Raises:
        SetupError: one of the two is missing, or they do not belong together.
    """
    if (chain is None) != (key is None):
        raise SetupError("name both --tls-cert-file and --tls-key-file, or neither")
    return None if chain is None or key is None else Certificate(chain, key)
