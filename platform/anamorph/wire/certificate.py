"""A certificate that somebody else renews in files, while a server uses it."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

_log = logging.getLogger(__name__)

REFRESH_S = 60
"""Seconds between two looks at the files."""


class CertificateFiles:
    """A chain and its key, in PEM.

    Raises:
        OSError: the chain cannot be read.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        self._loaded = self._content()

    def load(self, context: ssl.SSLContext) -> None:
        """Have a server's new connections use them.

        Raises:
            OSError: they cannot be read, or do not belong together.
        """
        context.load_cert_chain(self._chain, self._key)

    def renew(self, context: ssl.SSLContext) -> bool:
        """Load what has changed, if anything has; answers whether.

        Files that do not fit, such as those that are just being replaced, change nothing.
        """
        try:
            content = self._content()
            if content == self._loaded:
                return False
            # On the side first: a context that takes half of it would serve nobody.
            self.load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self.load(context)
        except OSError as error:  # an ssl.SSLError is one, too
            _log.warning("the certificate in %s cannot be loaded: %s", self._chain, type(error).__name__)
            return False
        self._loaded = content
        _log.info("a new certificate is in use")
        return True

    def _content(self) -> bytes:
        # Of the certificate alone: a new key comes with a new one, and no key is kept here.
        return self._chain.read_bytes()
