"""From a root to subkeys and check values (docs/spec/keys.md, sections 2 and 3)."""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from anamorph.errors import InvalidKey

KEY_BYTES = 32
SALT = b"anamorph/v1"
CHECK_BYTES = 8

# Space names that stand for a purpose instead of an axis of a tensor.
VOCAB = "vocab"
MANIFEST = "manifest"
KCV = "kcv"
# Reserved: no table gives one of these names to an axis, except vocab, which is one.
PURPOSES = frozenset({VOCAB, MANIFEST, KCV, "plan", "fold", "compare"})


def encode_context(*items: str) -> bytes:
    """Encode a list of strings so that no two lists give the same bytes.

    Each item is its length as u32 big-endian, then its UTF-8.
    """
    encoded = [item.encode("utf-8") for item in items]
    return b"".join(struct.pack(">I", len(item)) + item for item in encoded)


def check_secret(secret: bytes) -> bytes:
    """Return ``secret`` if it can be a root or a subkey.

    Raises:
        InvalidKey: not exactly 32 bytes.
    """
    if not isinstance(secret, bytes) or len(secret) != KEY_BYTES:
        raise InvalidKey(f"a root or subkey is exactly {KEY_BYTES} bytes")
    return secret


def subkey(root: bytes, tenant: str, model: str, version: int, space: str) -> bytes:
    """Derive the 32-byte subkey of one space (HKDF-SHA256, RFC 5869).

    Raises:
        InvalidKey: ``root`` is not 32 bytes, or ``space`` is empty.
    """
    if not space:
        raise InvalidKey("a space needs a name")
    info = encode_context(tenant, model, str(version), space)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=SALT, info=info).derive(check_secret(root))


def check_value(secret: bytes, tenant: str, model: str, version: int) -> str:
    """First 8 bytes of HMAC-SHA256(secret, (tenant, model, version)) as 16 hexadecimal digits.

    Raises:
        InvalidKey: ``secret`` is not 32 bytes.
    """
    context = encode_context(tenant, model, str(version))
    return hmac.new(check_secret(secret), context, hashlib.sha256).digest()[:CHECK_BYTES].hex()
