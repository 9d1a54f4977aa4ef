"""Least privilege, by trying: what a stolen token of each identity is refused by a real Vault."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from anamorph_keysvc.vault.policies import policies
from anamorph_keysvc.vault.settings import Identity
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from tests.keysvc.vault.conftest import Place

pytestmark = pytest.mark.real
AT = root_context("acme", "chat", 1)
CONTEXT = base64.b64encode(AT.encode()).decode()
WORD = base64.b64encode(b"word").decode()
MADE = {"type": "aes256-gcm96", "derived": True}
TRANSIT = "anamorph-transit"
ISSUER, RELEASER, SHREDDER = Identity
Try = tuple[str, str, dict[str, Any] | None]

ENCRYPT: Try = ("POST", "encrypt/{kek}", {"plaintext": WORD, "context": CONTEXT})
ENCRYPT_MANY: Try = ("POST", "encrypt/{kek}", {"batch_input": [{"plaintext": WORD, "context": CONTEXT}]})
ENCRYPT_OLD: Try = ("POST", "encrypt/{kek}", {"plaintext": WORD, "context": CONTEXT, "key_version": 1})
UPSERT: Try = ("POST", "encrypt/{kek}-new", {"plaintext": WORD, "context": CONTEXT})
DECRYPT: Try = ("POST", "decrypt/{kek}", {"ciphertext": "{wrapped}", "context": CONTEXT})
REWRAP: Try = ("POST", "rewrap/{kek}", {"batch_input": [{"ciphertext": "{wrapped}", "context": CONTEXT}]})
SIGN: Try = ("POST", "sign/anamorph-audit", {"input": WORD})
ROTATE: Try = ("POST", "keys/{kek}/rotate", {})
CREATE: Try = ("POST", "keys/{kek}-new", MADE)
TRIM: Try = ("POST", "keys/{kek}/trim", {"min_available_version": 1})
FLOOR: Try = ("POST", "keys/{kek}/config", {"min_decryption_version": 1})
READ: Try = ("GET", "keys/{kek}", None)
# Nobody but Vault's administrator.
NEVER: dict[str, Try] = {
    "make exportable": ("POST", "keys/{kek}/config", {"exportable": True}),
    "make exportable beside a floor": (
        "POST",
        "keys/{kek}/config",
        {"min_decryption_version": 1, "exportable": True},
    ),
    "make deletable": ("POST", "keys/{kek}/config", {"deletion_allowed": True}),
    "allow backup in clear": ("POST", "keys/{kek}/config", {"allow_plaintext_backup": True}),
    "stop auto-rotation": ("POST", "keys/{kek}/config", {"auto_rotate_period": "0"}),
    "back up": ("GET", "backup/{kek}", None),
    "restore": ("POST", "restore/{kek}-new", {"backup": WORD}),
    "export": ("GET", "export/encryption-key/{kek}", None),
    "export the audit key": ("GET", "export/signing-key/anamorph-audit", None),
    "delete": ("DELETE", "keys/{kek}", None),
    "create exportable": ("POST", "keys/{kek}-new", {**MADE, "exportable": True}),
    "create with backup": ("POST", "keys/{kek}-new", {**MADE, "allow_plaintext_backup": True}),
    "create underived": ("POST", "keys/{kek}-new", {"type": "aes256-gcm96", "derived": False}),
    "create underived by leaving it out": ("POST", "keys/{kek}-new", {"type": "aes256-gcm96"}),
    "create convergent": ("POST", "keys/{kek}-new", {**MADE, "convergent_encryption": True}),
    "create another type": ("POST", "keys/{kek}-new", {"type": "ed25519", "derived": True}),
    "create by encrypting": UPSERT,
    "import": ("POST", "keys/{kek}-new/import", {"ciphertext": WORD, "type": "aes256-gcm96"}),
    "data key": ("POST", "datakey/plaintext/{kek}", {"context": CONTEXT}),
    "hmac": ("POST", "hmac/{kek}", {"input": WORD}),
    "list": ("LIST", "keys", None),
    "configure the mount": ("POST", "config/keys", {"disable_upsert": False}),
    "rotate the audit key": ("POST", "keys/anamorph-audit/rotate", {}),
    "trim the audit key": ("POST", "keys/anamorph-audit/trim", {"min_available_version": 1}),
    "configure the audit key": ("POST", "keys/anamorph-audit/config", {"min_encryption_version": 1}),
}
MAY: dict[Identity, list[Try]] = {
    ISSUER: [ENCRYPT, SIGN, ROTATE, CREATE],
    RELEASER: [DECRYPT, REWRAP, READ],
    SHREDDER: [FLOOR, TRIM, READ],
}
ALL = [ENCRYPT, DECRYPT, REWRAP, SIGN, ROTATE, CREATE, TRIM, FLOOR, READ, ENCRYPT_MANY, ENCRYPT_OLD]
ELSEWHERE = [
    "sys/mounts",
    "sys/audit",
    "sys/policies/acl/anamorph-issuer",
    "auth/token/create",
    "cubbyhole/a",
]


@pytest.fixture
def statuses(
    wrapper: VaultTransitWrapper, place: Place, kek: str, token_of: Callable[[Identity], str]
) -> Callable[[Identity, Try], int]:
    """The status of a bare call with an identity's token, on a KEK with one wrapped secret."""
    wrapped = wrapper.wrap(kek, b"root", AT).decode()

    def status(identity: Identity, attempt: Try) -> int:
        method, path, body = attempt
        filled = None if body is None else _filled(body, wrapped)
        with place.server.client(token_of(identity)) as client:
            url = f"{TRANSIT}/{path.format(kek=kek)}"
            return client.request(method, url, json=filled).status_code

    return status


@pytest.mark.parametrize("identity", Identity)
def test_identity_does_its_work_and_no_other(
    statuses: Callable[[Identity, Try], int], identity: Identity
) -> None:
    """The whole matrix of legitimate calls: its own succeed, the others' are refused."""
    allowed = [attempt for attempt in ALL if statuses(identity, attempt) != 403]
    assert sorted(map(repr, allowed)) == sorted(map(repr, MAY[identity]))


@pytest.mark.parametrize("identity", Identity)
@pytest.mark.parametrize("attempt", NEVER.values(), ids=NEVER)
def test_nobody_may(statuses: Callable[[Identity, Try], int], identity: Identity, attempt: Try) -> None:
    """What would let a stolen token take keys away, weaken them, or lose them."""
    assert statuses(identity, attempt) == 403


@pytest.mark.parametrize("identity", Identity)
def test_nothing_outside_the_mount(
    place: Place, token_of: Callable[[Identity], str], identity: Identity
) -> None:
    """Neither Vault's settings nor tokens nor a place to store anything."""
    with place.server.client(token_of(identity)) as client:
        assert {client.get(path).status_code for path in ELSEWHERE} == {403}
        assert client.post("auth/token/create", json={}).status_code == 403


def test_allowed_calls_work(statuses: Callable[[Identity, Try], int]) -> None:
    """Not 403 is not enough: each identity's own calls are done."""
    done = {
        statuses(identity, attempt) for identity, own in MAY.items() for attempt in own if attempt != TRIM
    }
    assert done == {200}


def test_policies_follow_the_mount() -> None:
    """No path of another mount is in them."""
    text = "".join(policies("elsewhere").values())
    assert "elsewhere/keys" in text
    assert TRANSIT not in text


def _filled(body: dict[str, Any], wrapped: str) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [_filled(item, wrapped) for item in value]
        return wrapped if value == "{wrapped}" else value

    return {name: fill(value) for name, value in body.items()}
