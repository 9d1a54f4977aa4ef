"""The X25519 public key that a release is sealed to, as it crosses the wire."""

from __future__ import annotations

import base64
import binascii

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from anamorph.errors import InvalidKey

_PUBLIC_BYTES = 32


def check_recipient(text: str) -> X25519PublicKey:
    """The public key that ``text`` (base64) is.

    Raises:
        InvalidKey: not 32 bytes, or a point of low order, to which anybody could open.
    """
    raw = decoded(text)
    if len(raw) != _PUBLIC_BYTES:
        raise InvalidKey(f"a recipient is a raw X25519 public key of {_PUBLIC_BYTES} bytes in base64")
    key = X25519PublicKey.from_public_bytes(raw)
    try:
        # Scalars are multiples of the cofactor: points of low order give zero with every key.
        X25519PrivateKey.from_private_bytes(bytes(_PUBLIC_BYTES)).exchange(key)
    except ValueError:
        raise InvalidKey("this recipient is a point of low order: generate an X25519 key pair") from None
    return key


def decoded(text: str) -> bytes:
    """Bytes from base64.

    Raises:
        InvalidKey: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidKey("this is no base64") from None
