"""Signs the checkpoints of audit chains with a key that never leaves Vault."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from typing import Any

from anamorph.errors import Unavailable
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.settings import AUDIT_KEY
from anamorph_keysvc.vault.transport import RETRY_AFTER_S, Call

_SIGNATURE = re.compile(r"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]{86}==)")


class VaultSigner:
    """Ed25519 by the transit key ``anamorph-audit``, which ``vault setup`` makes.

    Each method raises ``Unavailable`` as ``VaultTransitWrapper`` does.
    """

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """Version of the key, and its signature of 64 bytes over ``message`` itself."""
        body = {"input": b64encode(message).decode()}
        answer = self._vault.issuer.must(self._call("sign", "POST", "sign", body))
        match = _SIGNATURE.fullmatch(str(answer.data.get("signature")))
        if match is None:
            raise Unavailable(
                f"Vault's key {AUDIT_KEY} is no Ed25519 key: run 'anamorph-keysvc vault check'",
                code="kms_denied",
                retry_after=RETRY_AFTER_S,
            )
        return int(match[1]), b64decode(match[2])

    def public_keys(self) -> dict[int, bytes]:
        """The 32 bytes of each version's public key."""
        found = self._vault.issuer.must(self._call("read", "GET", "keys", None)).data["keys"]
        return {int(version): b64decode(key["public_key"]) for version, key in found.items()}

    def _call(self, operation: str, method: str, kind: str, body: dict[str, Any] | None) -> Call:
        path = (*self._vault.settings.mount.split("/"), kind, AUDIT_KEY)
        return Call(operation, method, path, body, repeatable=True)
