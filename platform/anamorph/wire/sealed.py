"""Release sealed to whoever asked for it: what ends TLS on the way sees ciphertext.

    recipient = Recipient.generate("acme", "chat", 3, "client")
    ...                                     # the request carries recipient.public
    release = recipient.open(answer)        # release.material() is the key

HPKE (RFC 9180), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305.
A recipient's key serves one release. ``info`` names the key and what it is for, so
that one release never opens as another. Base mode does not say who sealed: against a
party that swaps the recipient's key in the request, TLS to the key service is what
protects, and the key's check value is what tells a wrong key from the right one.
"""

from __future__ import annotations

import base64
from typing import Literal, NoReturn, SupportsIndex

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from anamorph.errors import InvalidId, InvalidKey, KeyMismatch
from anamorph.wire.admin import ReleaseRead
from anamorph.wire.ids import KeyId
from anamorph.wire.recipient import check_recipient, decoded

Purpose = Literal["client", "materialize"]

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_DOMAIN = b"anamorph release v1"


class Recipient:
    """One asker for one release: what it asks for, and the private key that opens the answer.

    Args:
        private: used for this release and no other.
        tenant, model, version, purpose: what is asked for; an answer about anything else is refused.
    """

    __slots__ = ("_private", "model", "purpose", "tenant", "version")

    def __init__(
        self, private: X25519PrivateKey, tenant: str, model: str, version: int, purpose: Purpose
    ) -> None:
        self._private = private
        self.tenant, self.model, self.version = tenant, model, version
        self.purpose: Purpose = purpose

    @classmethod
    def generate(cls, tenant: str, model: str, version: int, purpose: Purpose) -> Recipient:
        """A recipient with a fresh key."""
        return cls(X25519PrivateKey.generate(), tenant, model, version, purpose)

    @property
    def public(self) -> str:
        """Raw X25519 public key (32 bytes), base64."""
        return base64.b64encode(self._private.public_key().public_bytes_raw()).decode()

    def open(self, release: ReleaseRead) -> ReleaseRead:
        """The same release with its secret in clear.

        Raises:
            InvalidKey: the answer is not sealed, or malformed.
            KeyMismatch: about another key or purpose, altered, or sealed to another recipient.
        """
        if release.sealed is None:
            raise InvalidKey("the key service answered unsealed although a sealed answer was asked for")
        self._check(release)
        try:
            info = _info(release.purpose, release.key_id)
            secret = _SUITE.decrypt(decoded(release.sealed), self._private, info)
        except InvalidTag:
            raise KeyMismatch(
                f"the release of {release.key_id} does not open: altered, or sealed to someone else"
            ) from None
        return _with(release, secret=base64.b64encode(secret).decode(), sealed=None)

    def _check(self, release: ReleaseRead) -> None:
        named = _parsed(release.key_id)
        asked = (self.tenant, self.model, self.version, self.purpose)
        if (named.tenant, named.model, named.version, release.purpose) != asked:
            raise KeyMismatch("the release is not of the key and purpose that were asked for")

    def __repr__(self) -> str:
        return f"Recipient(public={self.public!r})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("Recipient is neither pickled nor copied: it holds a private key")


def seal(secret: bytes, recipient: str, *, purpose: Purpose, key_id: str) -> str:
    """``secret`` for ``recipient`` alone: base64 of encapsulated key (32 bytes) and ciphertext.

    Args:
        secret: key material.
        recipient: raw X25519 public key, base64.
        purpose: what it is for; opening needs the same.
        key_id: which key it is; opening needs the same.

    Raises:
        InvalidKey: ``recipient`` or ``key_id`` is malformed.
    """
    sealed = _SUITE.encrypt(secret, check_recipient(recipient), _info(purpose, key_id))
    return base64.b64encode(sealed).decode()


def seal_release(read: ReleaseRead, recipient: str) -> ReleaseRead:
    """The same release with its secret sealed to ``recipient``.

    Raises:
        InvalidKey: ``recipient`` is malformed, or the release is sealed already.
    """
    sealed = seal(read.material(), recipient, purpose=read.purpose, key_id=read.key_id)
    return _with(read, secret=None, sealed=sealed)


def _info(purpose: str, key_id: str) -> bytes:
    """Each part as u32 big-endian length and UTF-8, so that no two releases read alike."""
    key = _parsed(key_id)
    parts = (purpose, key_id, key.tenant, key.model, str(key.version))
    encoded = [_DOMAIN, *(part.encode() for part in parts)]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def _parsed(key_id: str) -> KeyId:
    try:
        return KeyId.parse(key_id)
    except InvalidId as error:
        raise InvalidKey(f"the release names no key: {error}") from None


def _with(release: ReleaseRead, *, secret: str | None, sealed: str | None) -> ReleaseRead:
    return release.model_validate({**release.model_dump(), "secret": secret, "sealed": sealed})
