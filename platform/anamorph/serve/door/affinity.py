"""Prompts that begin alike go to one replica: its cache of prefixes has their beginning already."""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Any

# One block of the engines' caches: less in common than that is not shared anyway.
PREFIX_IDS = 32


class Affinity:
    """Names the session of a request, by which Ray chooses among replicas.

    It remembers nothing: the name is a keyed digest of key id and leading ids, so that
    nobody who reads Ray's logs learns which prompts are alike, and two keys never share one.

    Args:
        secret: 32 bytes, by default drawn for this process.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secrets.token_bytes(32) if secret is None else secret

    def session(self, key_id: str, body: bytes) -> str:
        """The session of a completion's body; empty, that is any replica, for short or odd prompts."""
        prefix = _prefix(body)
        if prefix is None:
            return ""
        digest = hashlib.blake2b(key=self._secret, digest_size=16)
        digest.update(f"{key_id}:{prefix}".encode())
        return digest.hexdigest()


def _prefix(body: bytes) -> list[int] | None:
    """The first block of the first prompt, if there is one; the engine says what is wrong otherwise."""
    try:
        fields: Any = json.loads(body)
        prompt = fields["prompt"]
        ids = prompt[0] if isinstance(prompt[0], list) else prompt
        leading = ids[:PREFIX_IDS]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    whole = len(leading) == PREFIX_IDS and all(type(i) is int for i in leading)
    return leading if whole else None
