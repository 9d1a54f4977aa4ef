"""Tokens of the service's identities, counted and revoked at Vault itself."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.servers.vault import VaultServer

LOGIN = "auth/approle/login"


def living_tokens(vault: VaultServer) -> Counter[str]:
    """Living tokens by the policy of the identity that logged in with a secret id."""
    accessors = vault.ask("LIST", "auth/token/accessors")["data"]["keys"]
    found = [
        vault.ask("POST", "auth/token/lookup-accessor", {"accessor": accessor})["data"]
        for accessor in accessors
    ]
    return Counter(policy for token in found if token["path"] == LOGIN for policy in token["policies"])


def revoke_tokens(vault: VaultServer) -> int:
    """Revoke every token that an identity of ours holds; how many there were."""
    accessors = vault.ask("LIST", "auth/token/accessors")["data"]["keys"]
    ours = [accessor for accessor in accessors if _of_an_identity(vault, accessor)]
    for accessor in ours:
        vault.ask("POST", "auth/token/revoke-accessor", {"accessor": accessor})
    return len(ours)


def _of_an_identity(vault: VaultServer, accessor: str) -> bool:
    found = vault.ask("POST", "auth/token/lookup-accessor", {"accessor": accessor})["data"]
    return bool(found["path"] == LOGIN)
