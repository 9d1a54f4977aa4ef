"""Sealed releases: who opens one, who does not, and that it is HPKE as RFC 9180 says."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import pickle
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from anamorph.errors import InvalidKey, KeyMismatch
from anamorph.wire import sealed
from anamorph.wire.admin import ReleaseRead, ReleaseRequest
from anamorph.wire.keyservice import AsyncKeyService, KeyService
from anamorph.wire.sealed import Recipient

SECRET = bytes(range(100, 132))
KEY_ID = "acme.chat.v3.0123456789abcdef"
# Points of low order; the last one with the top bit set, which X25519 ignores.
LOW_ORDER = [
    "0" * 64,
    "01" + "0" * 62,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b880",
]


def clear(**changes: Any) -> ReleaseRead:
    plain = {
        "purpose": "client",
        "key_id": KEY_ID,
        "kcv": "0123456789abcdef",
        "vocab_kcv": "fedcba9876543210",
        "vocab_size": 50,
        "secret": base64.b64encode(SECRET).decode(),
        "expires_at": datetime(2030, 1, 1, tzinfo=UTC),
    }
    return ReleaseRead.model_validate(plain | changes)


def recipient(purpose: Any = "client") -> Recipient:
    return Recipient.generate("acme", "chat", 3, purpose)


def test_who_asked_opens_it() -> None:
    """The release comes back as it was, secret included; on the way it holds none."""
    asker = recipient()
    crossing = sealed.seal_release(clear(), asker.public)
    assert crossing.secret is None
    arrived = ReleaseRead.model_validate_json(crossing.model_dump_json())
    assert asker.open(arrived) == clear()
    assert asker.open(arrived).material() == SECRET


def test_each_sealing_differs() -> None:
    """An ephemeral key per sealing: two releases of one key to one recipient share nothing."""
    asker = recipient()
    one, other = (sealed.seal_release(clear(), asker.public).sealed for _ in range(2))
    assert one is not None
    assert other is not None
    assert base64.b64decode(one)[:32] != base64.b64decode(other)[:32]


@pytest.mark.parametrize(
    "changes",
    [
        {"key_id": "acme.chat.v4.0123456789abcdef"},
        {"key_id": "acme.other.v3.0123456789abcdef"},
        {"key_id": "rival.chat.v3.0123456789abcdef"},
        {"key_id": "acme.chat.v3.0123456789abcdee"},
        {"purpose": "materialize"},
    ],
)
def test_an_answer_about_something_else_is_refused(changes: dict[str, Any]) -> None:
    """Where the asker can see it, and where only ``info`` tells."""
    asker = recipient()
    with pytest.raises(KeyMismatch):
        asker.open(sealed.seal_release(clear(), asker.public).model_copy(update=changes))


def test_a_release_for_another_version_is_refused_even_if_well_sealed() -> None:
    """The asker compares the answer with what it asked for, not with what the answer says of itself."""
    asker = recipient()
    with pytest.raises(KeyMismatch, match="asked for"):
        asker.open(sealed.seal_release(clear(key_id="acme.chat.v2.0123456789abcdef"), asker.public))


def test_nobody_else_opens_it() -> None:
    """Another recipient of the same release gets one error, without a cause that could quote anything."""
    crossing = sealed.seal_release(clear(), recipient().public)
    with pytest.raises(KeyMismatch) as refused:
        recipient().open(crossing)
    assert refused.value.__cause__ is None


@given(st.integers(0, 79), st.integers(1, 255))
def test_no_altered_byte_passes(place: int, change: int) -> None:
    """Encapsulated key, ciphertext and tag: 80 bytes, none of which may change."""
    asker = recipient()
    crossing = sealed.seal_release(clear(), asker.public)
    assert crossing.sealed is not None
    raw = bytearray(base64.b64decode(crossing.sealed))
    assert len(raw) == 80
    raw[place] ^= change
    with pytest.raises(KeyMismatch):
        asker.open(crossing.model_copy(update={"sealed": base64.b64encode(raw).decode()}))


@pytest.mark.parametrize("broken", ["", "AAAA", "not base64!", base64.b64encode(bytes(79)).decode()])
def test_what_is_no_ciphertext_is_refused(broken: str) -> None:
    """Too short or no base64 at all: refused with one of the two errors, never something of the library's."""
    with pytest.raises((InvalidKey, KeyMismatch)):
        recipient().open(clear(secret=None, sealed="AAAA").model_copy(update={"sealed": broken}))


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point: str) -> None:
    """Sealed to such a point everybody could open: refused in the message, and again when sealing."""
    text = base64.b64encode(bytes.fromhex(point)).decode()
    with pytest.raises(InvalidKey, match="low order"):
        sealed.seal(SECRET, text, purpose="client", key_id=KEY_ID)
    with pytest.raises(ValidationError, match="low order"):
        ReleaseRequest(purpose="client", recipient=text)


@pytest.mark.parametrize(
    "text", ["", "AAAA", "!" * 44, base64.b64encode(bytes(33)).decode(), "A" * 42 + "B="]
)
def test_what_is_no_public_key_is_refused(text: str) -> None:
    """In the request, before a single-use grant would be spent for nothing."""
    with pytest.raises(ValidationError):
        ReleaseRequest(purpose="client", recipient=text)


def test_every_fresh_recipient_is_accepted() -> None:
    """The pattern of the message admits all keys, whatever their last digit."""
    for _ in range(64):
        asker = recipient()
        assert ReleaseRequest(purpose="client", recipient=asker.public).recipient == asker.public


@pytest.mark.parametrize("both", [{"sealed": "AAAA"}, {"secret": None}])
def test_a_release_is_in_clear_or_sealed(both: dict[str, Any]) -> None:
    """Never both, never neither; the error does not quote the secret."""
    with pytest.raises(ValidationError) as refused:
        clear(**both)
    assert base64.b64encode(SECRET).decode() not in str(refused.value)


def test_sealed_material_is_not_read() -> None:
    """What is still sealed has no key bytes, and is not sealed twice."""
    crossing = sealed.seal_release(clear(), recipient().public)
    with pytest.raises(InvalidKey, match="sealed"):
        crossing.material()
    with pytest.raises(InvalidKey, match="sealed"):
        sealed.seal_release(crossing, recipient().public)


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_recipient_stays_where_it_is(leak: Callable[[Recipient], object]) -> None:
    """It is neither pickled nor copied, and shows its public half only."""
    asker = recipient()
    with pytest.raises(TypeError):
        leak(asker)
    assert repr(asker) == f"Recipient(public={asker.public!r})"


# The clients of the key service.


def proxied(answer: Callable[[ReleaseRequest], ReleaseRead]) -> httpx.MockTransport:
    """A key service reduced to its answer."""

    def handle(request: httpx.Request) -> httpx.Response:
        asked = ReleaseRequest.model_validate_json(request.content)
        return httpx.Response(200, json=json.loads(answer(asked).model_dump_json()))

    return httpx.MockTransport(handle)


def sealing(asked: ReleaseRequest) -> ReleaseRead:
    assert asked.recipient is not None
    return sealed.seal_release(clear(purpose=asked.purpose), asked.recipient)


def unsealed(_asked: ReleaseRequest) -> ReleaseRead:
    return clear()


async def test_both_clients_ask_for_sealed_and_open_it() -> None:
    """Without being told to."""
    with KeyService("http://keysvc", transport=proxied(sealing)) as keys:
        assert keys.release("acme", "chat", 3, "materialize").material() == SECRET
    async with AsyncKeyService("http://keysvc", transport=proxied(sealing)) as akeys:
        assert (await akeys.release("acme", "chat", 3, "client")).material() == SECRET


async def test_both_clients_refuse_an_unsealed_answer() -> None:
    """Whoever sits between could otherwise simply drop the wish; the error holds no secret."""
    with (
        KeyService("http://keysvc", transport=proxied(unsealed)) as keys,
        pytest.raises(InvalidKey) as refused,
    ):
        keys.release("acme", "chat", 3, "client")
    assert base64.b64encode(SECRET).decode() not in str(refused.value)
    async with AsyncKeyService("http://keysvc", transport=proxied(unsealed)) as akeys:
        with pytest.raises(InvalidKey, match="unsealed"):
            await akeys.release("acme", "chat", 3, "client")


# HPKE written down once more from RFC 9180, to be compared with what the library does.

_KEM = b"KEM\x00\x20"
_HPKE = b"HPKE\x00\x20\x00\x01\x00\x03"


def _extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, hashlib.sha256)


def _expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(prk, labelled + b"\x01", hashlib.sha256)[:length]


def _keys(shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and base nonce of mode base (section 5.1)."""
    context = b"\x00" + _extract(_HPKE, b"", b"psk_id_hash", b"") + _extract(_HPKE, b"", b"info_hash", info)
    secret = _extract(_HPKE, shared, b"secret", b"")
    return _expand(_HPKE, secret, b"key", context, 32), _expand(_HPKE, secret, b"base_nonce", context, 12)


def _shared(private: X25519PrivateKey, other: bytes, enc: bytes, receiver: bytes) -> bytes:
    """Shared secret of DHKEM (section 4.1), from either side."""
    dh = private.exchange(X25519PublicKey.from_public_bytes(other))
    prk = _extract(_KEM, b"", b"eae_prk", dh)
    return _expand(_KEM, prk, b"shared_secret", enc + receiver, 32)


def rfc_open(message: bytes, private: X25519PrivateKey, info: bytes, aad: bytes = b"") -> bytes:
    enc, ciphertext = message[:32], message[32:]
    key, nonce = _keys(_shared(private, enc, enc, private.public_key().public_bytes_raw()), info)
    return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, aad)


def rfc_seal(plain: bytes, ephemeral: X25519PrivateKey, to: bytes, info: bytes, aad: bytes = b"") -> bytes:
    enc = ephemeral.public_key().public_bytes_raw()
    key, nonce = _keys(_shared(ephemeral, to, enc, to), info)
    return enc + ChaCha20Poly1305(key).encrypt(nonce, plain, aad)


def spelled_out(purpose: str) -> bytes:
    """``info`` as the specification gives it."""
    parts = [b"anamorph release v1", purpose.encode(), KEY_ID.encode(), b"acme", b"chat", b"3"]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def test_the_second_writing_agrees_with_the_rfc() -> None:
    """RFC 9180 A.2.1, DHKEM(X25519), HKDF-SHA256, ChaCha20-Poly1305, mode base, sequence 0."""
    ephemeral, receiver = (
        X25519PrivateKey.from_private_bytes(bytes.fromhex(seed))
        for seed in (
            "f4ec9b33b792c372c1d2c2063507b684ef925b8c75a42dbcbf57d63ccd381600",
            "8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb",
        )
    )
    message = bytes.fromhex(
        "1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a"
        "1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28"
    )
    plain, info, aad = b"Beauty is truth, truth beauty", b"Ode on a Grecian Urn", b"Count-0"
    to = receiver.public_key().public_bytes_raw()
    assert rfc_seal(plain, ephemeral, to, info, aad) == message
    assert rfc_open(message, receiver, info, aad) == plain


def test_what_we_seal_opens_by_the_rfc() -> None:
    """A client in any language can open a release."""
    private = X25519PrivateKey.generate()
    public = base64.b64encode(private.public_key().public_bytes_raw()).decode()
    message = base64.b64decode(sealed.seal(SECRET, public, purpose="client", key_id=KEY_ID))
    assert rfc_open(message, private, spelled_out("client")) == SECRET


def test_what_is_sealed_by_the_rfc_opens_here() -> None:
    """And the other way round."""
    asker = recipient("materialize")
    to = base64.b64decode(asker.public)
    message = rfc_seal(SECRET, X25519PrivateKey.generate(), to, spelled_out("materialize"))
    crossing = clear(purpose="materialize", secret=None, sealed=base64.b64encode(message).decode())
    assert asker.open(crossing).material() == SECRET


def test_the_example_of_the_specification_opens() -> None:
    """A release sealed by an earlier version of this code, as ``docs/spec/release.md`` prints it."""
    page = (Path(__file__).parents[2] / "docs/spec/release.md").read_text()
    example = dict(re.findall(r"^(recipient|sealed|secret) +(\S+)$", page, re.MULTILINE))
    asker = Recipient(X25519PrivateKey.from_private_bytes(bytes(range(1, 33))), "acme", "chat", 3, "client")
    assert asker.public == example["recipient"]
    opened = asker.open(clear(secret=None, sealed=example["sealed"]))
    assert opened.secret == example["secret"] == base64.b64encode(SECRET).decode()
