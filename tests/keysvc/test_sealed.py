"""A release through a proxy that ends TLS: it sees ciphertext, and spends no grant by a bad wish."""

from __future__ import annotations

import base64

import httpx
import pytest
from tests.keysvc.conftest import World

from anamorph.keys import TenantKey, VocabKey
from anamorph.wire import sealed
from anamorph.wire.admin import Role
from anamorph.wire.keyservice import AsyncKeyService

AT = ("acme", "chat")
RELEASE = "/v1/tenants/acme/models/chat/keys/1:release"
LOW_ORDER = base64.b64encode(bytes(32)).decode()


class Proxy(httpx.AsyncBaseTransport):
    """Passes everything on and keeps all of it."""

    def __init__(self, behind: httpx.AsyncBaseTransport) -> None:
        self.behind = behind
        self.seen = b""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self.behind.handle_async_request(request)
        body = await response.aread()
        self.seen += repr(request.headers.raw + response.headers.raw).encode() + request.content + body
        return response


def forms(secret: bytes) -> list[bytes]:
    """Raw, hexadecimal, and base64 at each alignment that a longer text could give it."""
    encoded = [base64.b64encode(secret[skip:])[:-4] for skip in range(3)]
    urlsafe = [base64.urlsafe_b64encode(secret[skip:])[:-4] for skip in range(3)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *encoded, *urlsafe]


@pytest.fixture
def pending(world: World) -> World:
    world.model()
    world.rotate()
    return world


async def test_a_recording_proxy_sees_no_root(pending: World) -> None:
    """The job gets the root of its version; nothing that crossed holds it, or its subkey, in any form."""
    proxy = Proxy(pending.transport())
    async with AsyncKeyService("http://keysvc", pending.grant(1), transport=proxy) as job:
        released = await job.release(*AT, 1, "materialize")
    key = TenantKey.from_root(released.material(), *AT, 1)
    assert key.id == released.key_id
    assert released.key_id.encode() in proxy.seen  # what should be there is found this way
    assert not [form for form in forms(released.material()) if form in proxy.seen]


async def test_a_recording_proxy_sees_no_client_key(world: World) -> None:
    """The same for the key that clients use."""
    world.model()
    version = world.active()
    proxy = Proxy(world.transport())
    async with AsyncKeyService("http://keysvc", world.secret(Role.CLIENT), transport=proxy) as client:
        released = await client.release(*AT, version, "client")
    assert VocabKey(released.material(), released.key_id, released.vocab_kcv).id == released.key_id
    assert not [form for form in forms(released.material()) if form in proxy.seen]


async def test_without_a_recipient_the_same_proxy_would_see_it(pending: World) -> None:
    """The positive control: an answer in clear is found, so the two tests above can fail."""
    proxy = Proxy(pending.transport())
    headers = {"Authorization": f"Bearer {pending.grant(1)}"}
    async with httpx.AsyncClient(transport=proxy, base_url="http://keysvc", headers=headers) as http:
        answer = (await http.post(RELEASE, json={"purpose": "materialize"})).json()
    assert answer["sealed"] is None
    assert [form for form in forms(base64.b64decode(answer["secret"])) if form in proxy.seen]


@pytest.mark.parametrize("recipient", [LOW_ORDER, "AAAA", "", 7, LOW_ORDER[:-1]])
async def test_a_bad_recipient_spends_no_grant(pending: World, recipient: object) -> None:
    """422 before anything is released; the grant then still serves."""
    grant = pending.grant(1)
    async with pending.http(grant) as http:
        refused = await http.post(RELEASE, json={"purpose": "materialize", "recipient": recipient})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    async with pending.bearing(grant) as job:
        assert (await job.release(*AT, 1, "materialize")).sealed is None


async def test_a_sealed_answer_holds_no_secret_field(pending: World) -> None:
    """What the service answers is the one or the other."""
    asker = sealed.Recipient.generate(*AT, 1, "materialize")
    body = {"purpose": "materialize", "recipient": asker.public}
    async with pending.http(pending.grant(1)) as http:
        answer = await http.post(RELEASE, json=body)
    assert answer.json()["secret"] is None
    assert len(base64.b64decode(answer.json()["sealed"])) == 80
    assert answer.headers["cache-control"] == "no-store"
