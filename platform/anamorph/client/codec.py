"""Token ids to encrypted token ids and back: one permutation of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from anamorph.errors import BadRequest, InvalidKey, KeyMismatch
from anamorph.keys import TenantKey, VocabKey
from anamorph.wire.admin import ReleaseRead

Ids = npt.NDArray[np.int64]


class TokenCodec:
    """Encrypts and decrypts token ids under one key version.

    Args:
        key: a tenant key, a vocabulary key, a client release of the key service, or
            the 32 bytes of the ``vocab`` subkey (then with ``key_id`` and ``vocab_kcv``).
        vocab_size: rows of the model's embedding; ids are 0 to ``vocab_size - 1``.
        key_id, vocab_kcv: which key the bytes are said to be; with the other kinds of
            ``key`` they are optional and checked.

    Raises:
        KeyMismatch: the bytes are not the key of ``key_id`` and ``vocab_kcv``.
        InvalidKey: bytes without the identity they could be checked against.
    """

    __slots__ = ("_backward", "_forward", "_key_id", "_vocab_kcv")

    def __init__(
        self,
        key: TenantKey | VocabKey | ReleaseRead | bytes,
        vocab_size: int,
        *,
        key_id: str | None = None,
        vocab_kcv: str | None = None,
    ) -> None:
        if isinstance(key, ReleaseRead) and key.vocab_size != vocab_size:
            raise KeyMismatch(
                f"the key was released for {key.vocab_size} ids, the model has {vocab_size}; fetch both again"
            )
        vocab = _vocab_key(key, key_id, vocab_kcv)
        if (key_id or vocab.id) != vocab.id or (vocab_kcv or vocab.vocab_kcv) != vocab.vocab_kcv:
            raise KeyMismatch(f"this is the key {vocab.id}, not the one that was asked for")
        self._key_id, self._vocab_kcv = vocab.id, vocab.vocab_kcv
        self._forward: Ids = vocab.permutation(vocab_size)  # (vocab_size,), [plain] = encrypted
        self._backward: Ids = np.empty_like(self._forward)
        self._backward[self._forward] = np.arange(vocab_size)

    @property
    def key_id(self) -> str:
        """Key id that the ids are encrypted under."""
        return self._key_id

    @property
    def vocab_kcv(self) -> str:
        """Check value of the vocabulary key."""
        return self._vocab_kcv

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._forward)

    @overload
    def encrypt(self, ids: npt.NDArray[np.integer[Any]]) -> Ids: ...
    @overload
    def encrypt(self, ids: Iterable[int]) -> list[int]: ...
    def encrypt(self, ids: Any) -> Any:
        """Encrypted ids of plain ids: a list for any iterable, an int64 array of equal shape for an array.

        Raises:
            BadRequest: an id is no integer, or outside the vocabulary.
        """
        return _look_up(self._forward, ids)

    @overload
    def decrypt(self, ids: npt.NDArray[np.integer[Any]]) -> Ids: ...
    @overload
    def decrypt(self, ids: Iterable[int]) -> list[int]: ...
    def decrypt(self, ids: Any) -> Any:
        """Plain ids of encrypted ids; shapes and errors as :meth:`encrypt`."""
        return _look_up(self._backward, ids)

    def __repr__(self) -> str:
        return f"TokenCodec(key_id={self._key_id!r}, vocab_size={self.vocab_size})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("TokenCodec is neither pickled nor copied: its table is as secret as the key")


def _vocab_key(
    key: TenantKey | VocabKey | ReleaseRead | bytes, key_id: str | None, vocab_kcv: str | None
) -> VocabKey:
    if isinstance(key, VocabKey):
        return key
    if isinstance(key, TenantKey):
        return key.vocab_key()
    if isinstance(key, ReleaseRead):
        if key.purpose != "client":
            raise InvalidKey("this release carries a root; a client asks for purpose 'client'")
        return VocabKey(key.material(), key.key_id, key.vocab_kcv)
    if key_id is None or vocab_kcv is None:
        raise InvalidKey("bare key bytes cannot be checked; pass key_id= and vocab_kcv= with them")
    return VocabKey(bytes(key), key_id, vocab_kcv)


def _look_up(table: Ids, ids: Any) -> Any:
    if isinstance(ids, np.ndarray):
        return table[_checked(ids, len(table))]
    ids = list(ids)
    # NumPy would read True as 1 and 1.0 as 1: neither is an id.
    if any(not isinstance(item, int | np.integer) or isinstance(item, bool) for item in ids):
        raise BadRequest("a token id is an integer", code="invalid_value")
    try:
        array = np.asarray(ids, dtype=np.int64)
    except OverflowError:
        raise _out_of_range(len(table)) from None
    return table[_checked(array, len(table))].tolist()


def _checked(ids: npt.NDArray[Any], vocab_size: int) -> npt.NDArray[Any]:
    if ids.dtype.kind not in "iu":
        raise BadRequest("a token id is an integer", code="invalid_value")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise _out_of_range(vocab_size)
    return ids


def _out_of_range(vocab_size: int) -> BadRequest:
    return BadRequest(
        f"a token id lies outside 0 to {vocab_size - 1}; is this the model's own tokenizer?",
        code="invalid_value",
    )
