"""Who signs audit checkpoints: a key-management service, or a key file on one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anamorph.errors import SetupError
from anamorph_keysvc.checkpoints.export import write_once
from anamorph_keysvc.wrapper import check_private

SEED_BYTES = 32
FILE_NAME = "checkpoint.key"


class CheckpointSigner(Protocol):
    """Signs with Ed25519 under a key that never enters the database; not called inside a transaction."""

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """The version of the key that signed, and the signature (64 bytes).

        Raises:
            Unavailable: it cannot work just now.
        """
        ...

    def public_keys(self) -> dict[int, bytes]:
        """Raw public keys (32 bytes) by version, those that sign no more included.

        Raises:
            Unavailable: it cannot work just now.
        """
        ...


class LocalSigner:
    """An Ed25519 key in a file on this machine; there is one version.

    Whoever reads the file can sign a forged log: it is for one machine and for tests.

    Args:
        seed: 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    def __repr__(self) -> str:
        return "LocalSigner()"

    @classmethod
    def open(cls, path: Path, entropy: Callable[[int], bytes]) -> LocalSigner:
        """The signer of the key in ``path``, which is drawn if there is none yet.

        Raises:
            SetupError: the file is open to others, or damaged.
        """
        if not path.exists():
            write_once(path, entropy(SEED_BYTES), mode=0o600)
        check_private(path)
        seed = path.read_bytes()
        if len(seed) != SEED_BYTES:
            raise SetupError(f"{path} is damaged: restore it from a backup")
        return cls(seed)

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """Always version 1."""
        return 1, self._key.sign(message)

    def public_keys(self) -> dict[int, bytes]:
        """The one public key, as version 1."""
        return {1: self._key.public_key().public_bytes_raw()}
