"""The two keys that people and processes hold: a tenant's root, and a client's vocabulary key."""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Self, SupportsIndex

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anamorph.errors import InvalidId, InvalidKey, KeyMismatch
from anamorph.keys import derive, keyfile
from anamorph.keys.draw import Stream
from anamorph.wire.ids import KeyId, check_label

MAX_VERSION = 999_999_999


class _Secret:
    """Something with an id and bytes that must not leave the process by accident.

    It shows its id only, compares in constant time, and refuses to be pickled,
    copied, formatted or hashed (a class with ``__eq__`` alone has no hash).
    """

    __slots__ = ("_identity", "_secret")

    def __init__(self, secret: bytes, identity: KeyId) -> None:
        self._secret = secret
        self._identity = identity

    @property
    def id(self) -> str:
        """The key id, ``tenant.model.vN.kcv``."""
        return str(self._identity)

    @property
    def tenant(self) -> str:
        """Tenant id."""
        return self._identity.tenant

    @property
    def model(self) -> str:
        """Model id."""
        return self._identity.model

    @property
    def version(self) -> int:
        """Version number, from 1."""
        return self._identity.version

    @property
    def kcv(self) -> str:
        """Key-check value of the root, 16 hexadecimal digits."""
        return self._identity.kcv

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r})"

    def __format__(self, spec: str) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is not formatted into text; use its .id")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Secret) or type(other) is not type(self):
            return NotImplemented
        # & evaluates both sides: a matching id must not show in the time taken.
        return hmac.compare_digest(self._secret, other._secret) & (self._identity == other._identity)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is neither pickled nor copied: key bytes stay in one place")


class VocabKey(_Secret):
    """What a client holds: the ``vocab`` subkey and the identity it belongs to.

    Args:
        secret: the ``vocab`` subkey, 32 bytes.
        key_id: ``tenant.model.vN.kcv``.
        vocab_kcv: check value of the subkey, 16 hexadecimal digits.

    Raises:
        InvalidKey: ``secret`` is not 32 bytes.
        InvalidId: ``key_id`` does not parse.
        KeyMismatch: ``secret`` is not the subkey that ``key_id`` and ``vocab_kcv`` speak of.
    """

    __slots__ = ("_vocab_kcv",)

    def __init__(self, secret: bytes, key_id: str, vocab_kcv: str) -> None:
        identity = KeyId.parse(key_id)
        actual = derive.check_value(secret, identity.tenant, identity.model, identity.version)
        if not hmac.compare_digest(actual.encode(), vocab_kcv.encode()):
            raise KeyMismatch(
                f"this is not the vocabulary key of {key_id}; fetch the key of that version again"
            )
        super().__init__(secret, identity)
        self._vocab_kcv = actual

    @property
    def vocab_kcv(self) -> str:
        """Check value of the subkey, 16 hexadecimal digits."""
        return self._vocab_kcv

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """The vocabulary permutation: ``permutation(n)[plain id] == encrypted id``. Shape (n,)."""
        return Stream(self._secret).permutation(n)


class TenantKey(_Secret):
    """The root of one (tenant, model, version). It stays in the tenant or control zone.

    Raises:
        InvalidKey: ``root`` is not 32 bytes.
        InvalidId: ``tenant`` or ``model`` is no id, or ``version`` is not 1 to 999,999,999.
    """

    __slots__ = ()

    def __init__(self, root: bytes, tenant: str, model: str, version: int) -> None:
        check_label(tenant)
        check_label(model)
        if type(version) is not int or not 1 <= version <= MAX_VERSION:
            raise InvalidId(f"a version is a whole number from 1 to {MAX_VERSION}")
        kcv_key = derive.subkey(root, tenant, model, version, derive.KCV)
        kcv = derive.check_value(kcv_key, tenant, model, version)
        super().__init__(root, KeyId(tenant, model, version, kcv))

    @classmethod
    def from_root(cls, root: bytes, tenant: str, model: str, version: int) -> Self:
        """The key of an existing root."""
        return cls(root, tenant, model, version)

    @classmethod
    def generate(
        cls, tenant: str, model: str, version: int, *, entropy: Callable[[int], bytes] = os.urandom
    ) -> Self:
        """A new key of 32 bytes from ``entropy``."""
        return cls.from_root(entropy(derive.KEY_BYTES), tenant, model, version)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a key file.

        Raises:
            InvalidKey: not a key file, readable by others than its owner, or its root
                does not give the key id that it names.
            OSError: the file cannot be opened.
        """
        stored = keyfile.read(Path(path))
        identity = stored.key_id
        try:
            key = cls(stored.root, identity.tenant, identity.model, identity.version)
        except InvalidId as error:
            raise InvalidKey(f"{path}: {error}") from None
        if not hmac.compare_digest(key.kcv, identity.kcv):
            raise InvalidKey(
                f"{path}: the root does not belong to the key id in this file; restore a good copy"
            )
        return key

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a key file with mode 0600, all of it or nothing.

        Raises:
            FileExistsError: ``path`` exists; a key is never overwritten.
        """
        keyfile.write(Path(path), keyfile.StoredKey(self._identity, self._secret))

    def hand_over(self, pipe: int) -> None:
        """Write this key into a pipe, for a process of our own that reads its other end.

        Raises:
            InvalidKey: the descriptor is no pipe; a key is written to nothing that lasts.
        """
        if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
            raise InvalidKey("a key is handed over through a pipe only")
        os.write(pipe, keyfile.encode(keyfile.StoredKey(self._identity, self._secret)))

    @classmethod
    def take_over(cls, pipe: int) -> Self:
        """Read a key that ``hand_over`` wrote, to the pipe's end, and close it.

        Raises:
            InvalidKey: something else came.
        """
        with os.fdopen(pipe, "rb") as file:
            stored = keyfile.decode(file.read(keyfile.MAX_BYTES + 1))
        identity = stored.key_id
        return cls(stored.root, identity.tenant, identity.model, identity.version)

    @property
    def vocab_kcv(self) -> str:
        """Check value of the ``vocab`` subkey, 16 hexadecimal digits."""
        return derive.check_value(self.subkey(derive.VOCAB), self.tenant, self.model, self.version)

    def subkey(self, space: str) -> bytes:
        """The 32-byte subkey of one space."""
        return derive.subkey(self._secret, self.tenant, self.model, self.version, space)

    def vocab_key(self) -> VocabKey:
        """What a client of this version is given."""
        return VocabKey(self.subkey(derive.VOCAB), self.id, self.vocab_kcv)

    def public_key(self) -> bytes:
        """Raw Ed25519 public key (32 bytes) that verifies this version's manifests."""
        return self._signer().public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature of ``message`` (64 bytes)."""
        return self._signer().sign(message)

    def _signer(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.subkey(derive.MANIFEST))
