"""Wrapping of roots: the database never holds a key that opens without the wrapper.

Each ciphertext is bound to its record by a context; moved to another record it
does not open. ``LocalWrapper`` serves one machine; ``vault.VaultTransitWrapper``
is the key-management service behind the same protocol.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from anamorph.errors import InvalidKey, SetupError

KEY_BYTES = 32
# The KEK of secrets that belong to no tenant; a tenant's KEK has a name of its own.
PLATFORM_KEK = "platform"
_FORMAT = b"L1"
_NONCE_BYTES = 12


@dataclass(frozen=True)
class Context:
    """The record that a wrapped secret belongs to."""

    tenant: str
    model: str
    version: int
    purpose: str

    def encode(self) -> bytes:
        """Each part as u32 big-endian length and UTF-8, so that no two contexts read alike."""
        parts = (self.tenant, self.model, str(self.version), self.purpose)
        encoded = [part.encode() for part in parts]
        return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def root_context(tenant: str, model: str, version: int) -> Context:
    """Context of a key version's root."""
    return Context(tenant, model, version, "root")


def signing_context(kid: str) -> Context:
    """Context of an inference-token signing key, which belongs to no tenant."""
    return Context("", "", 0, f"inference-signing:{kid}")


def webhook_context(tenant: str, webhook: str) -> Context:
    """Context of a webhook's signing secret."""
    return Context(tenant, "", 0, f"webhook:{webhook}")


class KeyWrapper(Protocol):
    """Encrypts small secrets under key-encryption keys (KEKs) that never enter the database.

    A KEK has an opaque name of ``[a-z0-9-]`` and numbered versions; wrapping uses the
    newest, unwrapping whichever a ciphertext names. No method is called inside a
    database transaction, since each may be a call over the network.

    Implementations raise ``Unavailable`` when they cannot work just now, and
    ``InvalidKey`` for a ciphertext that does not open under its KEK and context,
    whatever the reason.
    """

    @property
    def production(self) -> bool:
        """Whether the wrapper may stand between tenants' keys and an operator of the database."""
        ...

    def wrap(self, kek: str, secret: bytes, context: Context) -> bytes:
        """Ciphertext of ``secret``, bound to ``context``; creates the KEK if there is none yet."""
        ...

    def unwrap(self, kek: str, ciphertext: bytes, context: Context) -> bytes:
        """The secret that was wrapped under the same KEK and context."""
        ...

    def rewrap(self, kek: str, items: Sequence[tuple[bytes, Context]]) -> list[bytes]:
        """The same secrets under the newest version of the KEK, in order, without seeing them."""
        ...

    def kek_version(self, ciphertext: bytes) -> int:
        """The version of the KEK that a ciphertext was wrapped under; no call is made."""
        ...

    def newest(self, kek: str) -> int:
        """The newest version of a KEK, 0 if there is none yet."""
        ...

    def rotate(self, kek: str) -> int:
        """Add a version to a KEK; its number."""
        ...

    def shred(self, kek: str, below: int) -> None:
        """Erase all versions of a KEK below ``below`` for good; doing it again changes nothing."""
        ...

    def check(self) -> None:
        """Return if the wrapper can work now; raise ``Unavailable`` otherwise."""
        ...


class LocalWrapper:
    """AES-256-GCM under a key file on this machine; the context is associated data.

    A random nonce per wrap: the number of roots ever wrapped stays far below the
    2^32 at which random 96-bit nonces become a concern.

    Args:
        key: 32 bytes.
        entropy: source of nonces.
    """

    production: ClassVar[bool] = False

    def __init__(self, key: bytes, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        if len(key) != KEY_BYTES:
            raise InvalidKey(f"a wrapping key has {KEY_BYTES} bytes, this one has {len(key)}")
        self._cipher = AESGCM(key)
        self._entropy = entropy

    @classmethod
    def load(cls, path: Path) -> LocalWrapper:
        """Read the key file.

        Raises:
            SetupError: missing, or open to others than its owner.
            InvalidKey: not 32 bytes.
        """
        check_private(path)
        return cls(path.read_bytes())

    def wrap(self, kek: str, secret: bytes, context: Context) -> bytes:
        """Format mark, nonce, ciphertext with tag."""
        nonce = self._entropy(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, secret, _bound(kek, context))

    def unwrap(self, kek: str, ciphertext: bytes, context: Context) -> bytes:
        """The secret again.

        Raises:
            InvalidKey: altered, moved to another record, or wrapped under another key.
        """
        body = ciphertext.removeprefix(_FORMAT)
        try:
            if len(body) != len(ciphertext) - len(_FORMAT):
                raise InvalidTag
            return self._cipher.decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], _bound(kek, context))
        except (InvalidTag, ValueError):
            raise InvalidKey("a wrapped key does not open for the record it is stored in") from None

    def rewrap(self, kek: str, items: Sequence[tuple[bytes, Context]]) -> list[bytes]:
        """Fresh ciphertexts: the one key in the file stays."""
        return [self.wrap(kek, self.unwrap(kek, old, context), context) for old, context in items]

    def kek_version(self, ciphertext: bytes) -> int:  # noqa: ARG002 -- there is one version
        """Always 1."""
        return 1

    def newest(self, kek: str) -> int:  # noqa: ARG002 -- as above
        """Always 1."""
        return 1

    def rotate(self, kek: str) -> int:  # noqa: ARG002 -- as above
        """Always 1: a file has no versions, so destruction rests on erasing rows and backups."""
        return 1

    def shred(self, kek: str, below: int) -> None:
        """Nothing to erase: there is one version."""

    def check(self) -> None:
        """Always able to work."""


def _bound(kek: str, context: Context) -> bytes:
    name = kek.encode()
    return len(name).to_bytes(4, "big") + name + context.encode()


def check_private(path: Path) -> None:
    """Refuse a file or folder that anyone but its owner, who must be us, can reach.

    Raises:
        SetupError: missing, foreign, or with permissions for group or others.
    """
    try:
        status = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        raise SetupError(f"{path} is missing: run 'anamorph-keysvc init --home {path.parent}'") from None
    if status.st_mode & 0o077:
        mode = "700" if path.is_dir() else "600"
        raise SetupError(f"{path} is open to other users: run 'chmod {mode} {path}'")
    if status.st_uid != os.geteuid():
        raise SetupError(f"{path} belongs to another user: run the key service as its owner")
