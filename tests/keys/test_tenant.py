"""Tenant and vocabulary keys: identity, secrecy, files."""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import pickle
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from anamorph.errors import InvalidKey, KeyMismatch
from anamorph.keys import Stream, TenantKey, VocabKey, encode_context
from anamorph.wire.ids import KeyId

ROOT = bytes(range(32))
texts = st.text(st.characters(codec="utf-8"), max_size=8)
Secret = TenantKey | VocabKey


@pytest.fixture(params=["tenant", "vocab"])
def secret(request: pytest.FixtureRequest, key: TenantKey) -> Secret:
    return key if request.param == "tenant" else key.vocab_key()


def secret_spellings(key: TenantKey) -> list[str]:
    material = [ROOT, key.subkey("vocab")]
    return [
        spelling for raw in material for spelling in (raw.hex(), base64.b64encode(raw).decode(), repr(raw))
    ]


def decode_context(encoded: bytes) -> list[str]:
    items: list[str] = []
    while encoded:
        length = int.from_bytes(encoded[:4])
        items.append(encoded[4 : 4 + length].decode())
        encoded = encoded[4 + length :]
    return items


@given(st.lists(texts))
def test_contexts_are_unambiguous(items: list[str]) -> None:
    """The list can be read back from its encoding, so no two lists share one."""
    assert decode_context(encode_context(*items)) == items


@given(st.binary(min_size=32, max_size=32), st.integers(1, 999_999_999))
def test_key_id_parses_back(root: bytes, version: int) -> None:
    """A key's id takes apart into its tenant, model, version and check value."""
    key = TenantKey.from_root(root, "acme", "m-1", version)
    assert KeyId.parse(key.id) == KeyId("acme", "m-1", version, key.kcv)


@given(st.integers(0, 255))
def test_every_bit_of_the_root_counts(bit: int) -> None:
    """Flipping any bit of the root changes the check values and every subkey."""
    flipped = (int.from_bytes(ROOT) ^ (1 << bit)).to_bytes(32)
    one, other = (TenantKey.from_root(root, "acme", "m", 1) for root in (ROOT, flipped))
    assert one.kcv != other.kcv
    assert one.vocab_kcv != other.vocab_kcv
    assert one.subkey("residual") != other.subkey("residual")


def test_subkeys_are_bound_to_their_place() -> None:
    """The same root gives unrelated subkeys under another tenant, model, version or space."""
    places = [("acme", "m", 1), ("acne", "m", 1), ("acme", "n", 1), ("acme", "m", 2)]
    keys = [TenantKey.from_root(ROOT, *place) for place in places]
    assert len({key.subkey(space) for key in keys for space in ("vocab", "residual")}) == 8


def test_generate_takes_its_bytes_from_the_given_source() -> None:
    """``generate`` asks the given source for 32 bytes and uses exactly those."""
    asked: list[int] = []

    def entropy(n: int) -> bytes:
        asked.append(n)
        return ROOT

    assert TenantKey.generate("acme", "m", 1, entropy=entropy) == TenantKey.from_root(ROOT, "acme", "m", 1)
    assert asked == [32]


def test_generated_keys_differ() -> None:
    """Two generated keys are different keys."""
    assert TenantKey.generate("acme", "m", 1) != TenantKey.generate("acme", "m", 1)


def test_short_entropy_is_refused() -> None:
    """A randomness source that gives too few bytes is refused, not padded."""
    with pytest.raises(InvalidKey):
        TenantKey.generate("acme", "m", 1, entropy=lambda n: bytes(n - 1))


def test_empty_space_is_refused(key: TenantKey) -> None:
    """A space without a name has no subkey."""
    with pytest.raises(InvalidKey):
        key.subkey("")


def test_vocab_key_draws_what_the_plan_draws(key: TenantKey) -> None:
    """The client's permutation is the first draw of the vocab stream, every time it is asked."""
    vocab = key.vocab_key()
    expected = Stream(key.subkey("vocab")).permutation(1000)
    assert np.array_equal(vocab.permutation(1000), expected)
    assert np.array_equal(vocab.permutation(1000), expected)


def test_vocab_key_carries_the_identity(key: TenantKey) -> None:
    """A vocabulary key has the id and check value of the key it came from."""
    vocab = key.vocab_key()
    assert (vocab.id, vocab.vocab_kcv, vocab.version) == (key.id, key.vocab_kcv, 1)


def test_vocab_key_refuses_a_foreign_secret(key: TenantKey) -> None:
    """Another tenant's subkey under this key id is a mismatch, and the message shows neither."""
    foreign = TenantKey.from_root(bytes(32), "globex", "m", 1)
    with pytest.raises(KeyMismatch) as caught:
        VocabKey(foreign.subkey("vocab"), key.id, key.vocab_kcv)
    assert foreign.subkey("vocab").hex() not in str(caught.value)


def test_signature_verifies_under_the_public_key(key: TenantKey) -> None:
    """What a key signs verifies under its public key, and anything else does not."""
    public = Ed25519PublicKey.from_public_bytes(key.public_key())
    public.verify(key.sign(b"manifest"), b"manifest")
    with pytest.raises(InvalidSignature):
        public.verify(key.sign(b"manifest"), b"manifesto")


def test_shows_only_its_id(secret: Secret, key: TenantKey) -> None:
    """A key prints as its class and id."""
    assert repr(secret) == str(secret) == f"{type(secret).__name__}(id='{key.id}')"


@pytest.mark.parametrize(
    "leak",
    [
        pytest.param(lambda key: f"{key}", id="f-string"),
        pytest.param(lambda key: format(key, ">80"), id="format"),
        pytest.param(lambda key: "{}".format(key), id="str.format"),  # noqa: UP032  the method is what is tested
        pytest.param(pickle.dumps, id="pickle"),
        pytest.param(copy.copy, id="copy"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(hash, id="hash"),
        pytest.param(vars, id="vars"),
        pytest.param(bytes, id="bytes"),
        pytest.param(json.dumps, id="json"),
    ],
)
def test_refuses_to_leave(secret: Secret, leak: Any) -> None:
    """Formatting, pickling, copying, hashing, ``vars``, ``bytes`` and JSON are all refused."""
    with pytest.raises(TypeError) as caught:
        leak(secret)
    assert ROOT.hex() not in str(caught.value)


def test_log_lines_hold_no_secret(secret: Secret, key: TenantKey, caplog: pytest.LogCaptureFixture) -> None:
    """A key that ends up in a log line shows none of its bytes in any spelling."""
    logging.getLogger("test").warning("key %s %r", secret, secret)
    assert key.id in caplog.text
    assert not [spelling for spelling in secret_spellings(key) if spelling in caplog.text]


def test_equality(key: TenantKey) -> None:
    """Keys are equal when root and place are; never across types."""
    assert key == TenantKey.from_root(ROOT, "acme", "smollm2-135m", 1)
    assert key != TenantKey.from_root(ROOT, "acme", "smollm2-135m", 2)
    assert key != TenantKey.from_root(bytes(32), "acme", "smollm2-135m", 1)
    assert key.vocab_key() == key.vocab_key()
    assert key != key.vocab_key()
    assert key != ROOT


def test_save_and_load(key: TenantKey, tmp_path: Path) -> None:
    """A saved key loads again, lies there with mode 0600, and leaves nothing beside it."""
    path = tmp_path / "key.json"
    key.save(path)
    assert TenantKey.load(str(path)) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["key.json"]


@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_mode_does_not_depend_on_the_umask(key: TenantKey, tmp_path: Path, mask: int) -> None:
    """The file has mode 0600 under any umask."""
    before = os.umask(mask)
    try:
        key.save(tmp_path / "key.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("occupy", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_save_never_overwrites(key: TenantKey, tmp_path: Path, occupy: Any) -> None:
    """A file, a folder or a dangling link at the path stays as it is, and no staged file is left."""
    path = tmp_path / "key.json"
    occupy(path)
    with pytest.raises(FileExistsError):
        key.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["key.json"]
    assert not path.is_file() or path.read_bytes() == b""


def test_one_of_many_writers_wins(tmp_path: Path) -> None:
    """Of eight keys saved to one path at once, one is there, whole, and seven savers are told."""
    keys = [TenantKey.from_root(bytes([number]) * 32, "acme", "m", 1) for number in range(8)]
    refused: list[int] = []

    def save(number: int) -> None:
        try:
            keys[number].save(tmp_path / "key.json")
        except FileExistsError:
            refused.append(number)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert TenantKey.load(tmp_path / "key.json") == keys[(set(range(8)) - set(refused)).pop()]


def test_failed_write_leaves_nothing(key: TenantKey, tmp_path: Path) -> None:
    """Saving into a missing folder fails without leaving anything."""
    with pytest.raises(FileNotFoundError):
        key.save(tmp_path / "missing" / "key.json")
    assert list(tmp_path.iterdir()) == []


def test_missing_file(tmp_path: Path) -> None:
    """A missing key file is the system's own error, which names the path."""
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        TenantKey.load(tmp_path / "absent.json")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_load_wants_a_regular_file(tmp_path: Path, make: Any) -> None:
    """A folder or a FIFO in a key's place is refused at once."""
    make(tmp_path / "key.json")
    (tmp_path / "key.json").chmod(0o600)
    with pytest.raises(InvalidKey, match="is not a regular file"):
        TenantKey.load(tmp_path / "key.json")


def test_wide_permissions_name_the_remedy(key: TenantKey, tmp_path: Path) -> None:
    """A key file open to others is refused with the command that is right."""
    path = tmp_path / "key.json"
    key.save(path)
    path.chmod(0o644)
    with pytest.raises(InvalidKey, match=f"chmod 600 {path}"):
        TenantKey.load(path)


def test_errors_do_not_show_the_root(key: TenantKey, tmp_path: Path) -> None:
    """A file whose root and id do not belong together is refused without showing either's bytes."""
    path = tmp_path / "key.json"
    key.save(path)
    path.write_text(path.read_text().replace(key.kcv, "0" * 16))
    with pytest.raises(InvalidKey) as caught:
        TenantKey.load(path)
    assert not [spelling for spelling in secret_spellings(key) if spelling in str(caught.value)]
