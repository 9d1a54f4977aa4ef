"""Whom our clients believe: inside a cluster our own parts have certificates of an authority of its own."""

from __future__ import annotations

import os
import ssl
from functools import lru_cache
from pathlib import Path

import httpx

from anamorph import errors

CA_FILE = "ANAMORPH_CA_FILE"
"""Variable that names a file of PEM certificates, trusted besides the usual ones."""


def context() -> ssl.SSLContext:
    """The usual authorities, and those of the file that ``ANAMORPH_CA_FILE`` names.

    Raises:
        SetupError: there is no such file, or it holds no certificates.
    """
    file = os.environ.get(CA_FILE) or None
    try:
        return _context(file, None if file is None else Path(file).stat().st_mtime_ns)
    except OSError as error:  # an ssl.SSLError is one, too
        raise errors.SetupError(
            f"{CA_FILE}: {file} holds no PEM certificates ({type(error).__name__}): name a file that does"
        ) from None


@lru_cache(maxsize=1)
def _context(file: str | None, _changed_ns: int | None) -> ssl.SSLContext:
    """Reading the usual authorities takes 14 ms; clients of one process share them."""
    trusted = httpx.create_ssl_context(trust_env=False)
    if file is not None:
        trusted.load_verify_locations(file)
    return trusted
