"""The token codec."""

from __future__ import annotations

import base64
import copy
import pickle
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anamorph.client import TokenCodec
from anamorph.errors import BadRequest, InvalidKey, KeyMismatch
from anamorph.keys import TenantKey
from anamorph.wire.admin import ReleaseRead

SIZE = 500
KEY = TenantKey.from_root(bytes(range(32)), "acme", "chat", 1)
CODEC = TokenCodec(KEY, SIZE)
ids = st.lists(st.integers(0, SIZE - 1))


def release(key: TenantKey, *, purpose: Any = "client", vocab_size: int = SIZE) -> ReleaseRead:
    return ReleaseRead(
        purpose=purpose,
        key_id=key.id,
        kcv=key.kcv,
        vocab_kcv=key.vocab_kcv,
        vocab_size=vocab_size,
        secret=base64.b64encode(key.subkey("vocab")).decode(),
        expires_at=datetime.now(UTC),
    )


@given(ids)
def test_decrypting_undoes_encrypting(plain: list[int]) -> None:
    """What is encrypted decrypts to itself, id by id, in order."""
    assert CODEC.decrypt(CODEC.encrypt(plain)) == plain


@given(ids)
def test_arrays_and_lists_agree(plain: list[int]) -> None:
    """An array of any shape is encrypted as the list of its ids is."""
    array = np.array([plain, plain], dtype=np.int32)
    assert CODEC.encrypt(array).tolist() == [CODEC.encrypt(plain)] * 2


def test_it_follows_the_permutation_of_the_key(key: TenantKey) -> None:
    """Encrypted id of ``i`` is ``permutation(n)[i]``, the convention that plan and codec share."""
    assert CODEC.encrypt(range(SIZE)) == key.vocab_key().permutation(SIZE).tolist()


def test_every_kind_of_key_gives_the_same_codec(key: TenantKey) -> None:
    """Root, vocabulary key, release and bare subkey stand for the same permutation."""
    bare = TokenCodec(key.subkey("vocab"), SIZE, key_id=key.id, vocab_kcv=key.vocab_kcv)
    for codec in (TokenCodec(key.vocab_key(), SIZE), TokenCodec(release(key), SIZE), bare):
        assert codec.encrypt(range(SIZE)) == CODEC.encrypt(range(SIZE))
        assert (codec.key_id, codec.vocab_kcv, codec.vocab_size) == (key.id, key.vocab_kcv, SIZE)


@pytest.mark.parametrize(
    "bad",
    [[-1], [SIZE], [2**63], [1.0], [True], ["1"], [None], np.array([SIZE]), np.array([1.0]), np.array([-1])],
)
def test_what_is_no_id_of_the_vocabulary_is_refused(bad: Any) -> None:
    """No id is wrapped, rounded or clipped into the vocabulary."""
    for work in (CODEC.encrypt, CODEC.decrypt):
        with pytest.raises(BadRequest):
            work(bad)


def test_a_key_that_is_not_the_expected_one_is_refused(key: TenantKey) -> None:
    """A codec is never built under another key than the caller names."""
    other = TenantKey.from_root(bytes(32), "acme", "chat", 1)
    with pytest.raises(KeyMismatch):
        TokenCodec(other.subkey("vocab"), SIZE, key_id=key.id, vocab_kcv=key.vocab_kcv)
    for wrong in ({"key_id": other.id}, {"vocab_kcv": other.vocab_kcv}):
        with pytest.raises(KeyMismatch):
            TokenCodec(key, SIZE, **wrong)


def test_a_release_with_another_vocabulary_size_is_refused(key: TenantKey) -> None:
    """A permutation of another size is another permutation."""
    with pytest.raises(KeyMismatch):
        TokenCodec(release(key, vocab_size=SIZE + 1), SIZE)


def test_a_release_of_the_root_is_refused(key: TenantKey) -> None:
    """A client never takes a root for a subkey."""
    with pytest.raises(InvalidKey):
        TokenCodec(release(key, purpose="materialize"), SIZE)


def test_bytes_without_an_identity_are_refused(key: TenantKey) -> None:
    """Key bytes that cannot be checked are not used."""
    with pytest.raises(InvalidKey):
        TokenCodec(key.subkey("vocab"), SIZE)


def test_it_shows_its_key_id_and_stays_in_the_process() -> None:
    """Neither text nor pickles of a codec give its permutation away."""
    assert repr(CODEC) == f"TokenCodec(key_id={KEY.id!r}, vocab_size={SIZE})"
    with pytest.raises(TypeError):
        pickle.dumps(CODEC)
    with pytest.raises(TypeError):
        copy.deepcopy(CODEC)
