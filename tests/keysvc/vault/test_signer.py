"""Signatures by Vault verify with what it publishes, by anybody's Ed25519."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from anamorph_keysvc.checkpoints.signer import CheckpointSigner
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.signer import VaultSigner

if TYPE_CHECKING:
    from tests.keysvc.vault.conftest import Place

pytestmark = pytest.mark.real


def test_signature_verifies(vault: Vault) -> None:
    """Over the message itself, not over a digest of it."""
    signer: CheckpointSigner = VaultSigner(vault)
    version, signature = signer.sign(b"a checkpoint")
    key = Ed25519PublicKey.from_public_bytes(signer.public_keys()[version])
    key.verify(signature, b"a checkpoint")
    with pytest.raises(InvalidSignature):
        key.verify(signature, b"another")


def test_old_signatures_outlive_a_rotation(vault: Vault, place: Place) -> None:
    """The administrator rotates the key; both versions stay published."""
    signer = VaultSigner(vault)
    version, signature = signer.sign(b"a checkpoint")
    place.server.ask("POST", "anamorph-transit/keys/anamorph-audit/rotate", {})
    assert signer.sign(b"a checkpoint")[0] == version + 1
    keys = signer.public_keys()
    assert set(keys) >= {version, version + 1}
    Ed25519PublicKey.from_public_bytes(keys[version]).verify(signature, b"a checkpoint")
