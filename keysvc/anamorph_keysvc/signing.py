"""Opened signing keys of inference tokens, kept while they sign.

A token lives for minutes, a key-management service may be sealed for longer: what signs
tokens therefore stays in memory once it has been opened, and only there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class SigningKeys:
    """Private keys by kid, opened once each."""

    def __init__(self) -> None:
        self._keys: dict[str, Ed25519PrivateKey] = {}
        self._lock = threading.Lock()

    def get(self, kid: str, open_seed: Callable[[], bytes]) -> Ed25519PrivateKey:
        """The key, whose seed ``open_seed`` gives the first time."""
        known = self._keys.get(kid)
        if known is None:
            known = Ed25519PrivateKey.from_private_bytes(open_seed())
            with self._lock:
                self._keys[kid] = known
        return known

    def keep_only(self, kids: set[str]) -> None:
        """Forget all others."""
        with self._lock:
            self._keys = {kid: key for kid, key in self._keys.items() if kid in kids}
