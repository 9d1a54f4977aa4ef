"""Webhooks over HTTP: who may, what is refused, and what is never shown again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.keysvc.webhooks.receiver import Receiver

from anamorph import errors
from anamorph.wire.admin import Event, Role, TenantQuotaPatch, WebhookCreate
from anamorph.wire.keyservice import aeverything
from anamorph_keysvc.service import quotas
from anamorph_keysvc.webhooks.guard import Guard

if TYPE_CHECKING:
    from tests.keysvc.webhooks.conftest import Hooked

PATH = "/v1/tenants/acme/webhooks"
URL = "https://receiver.test/hook"
ROUTES = (
    ("POST", PATH),
    ("GET", PATH),
    ("GET", PATH + "/{id}"),
    ("DELETE", PATH + "/{id}"),
    ("POST", PATH + "/{id}:test"),
    ("GET", PATH + "/{id}/deliveries"),
)


async def test_a_webhook_from_creation_to_deletion(hooked: Hooked, receiver: Receiver) -> None:
    """Its secret is in the first answer only."""
    async with hooked.world.client(Role.ADMIN) as keys:
        made = await keys.create_webhook(
            "acme", WebhookCreate(url=receiver.url(), events=(Event.KEY_RETIRED,))
        )
        assert made.secret.startswith("whsec_")
        read = await keys.get_webhook("acme", made.id)
        assert read.model_dump() == made.model_dump(exclude={"secret"})
        assert [one async for one in aeverything(keys.list_webhooks, "acme")] == [read]
        sent = await keys.send_test_event("acme", made.id)
        hooked.deliver()
        (delivery,) = (await keys.list_deliveries("acme", made.id)).items
        assert (delivery.id, delivery.status, delivery.last_status) == (sent.id, "delivered", 204)
        assert await keys.delete_webhook("acme", made.id) == read
        with pytest.raises(errors.NotFound):
            await keys.get_webhook("acme", made.id)
        assert (await keys.list_webhooks("acme")).items == []


async def test_deliveries_come_in_pages(hooked: Hooked) -> None:
    """Oldest first."""
    made = hooked.create(URL)
    hooked.world.active()
    async with hooked.world.http(hooked.world.secret(Role.ADMIN)) as http:
        first = (await http.get(f"{PATH}/{made.id}/deliveries?limit=2")).json()
        second = (await http.get(f"{PATH}/{made.id}/deliveries", params={"page": first["next_page"]})).json()
    ids = [item["id"] for page in (first, second) for item in page["items"]]
    assert ids == sorted(ids)
    assert len(ids) == 3


async def test_no_answer_with_the_secret_is_kept(hooked: Hooked) -> None:
    """An Idempotency-Key is refused where a secret is answered, and nothing is made."""
    async with hooked.world.http(hooked.world.secret(Role.ADMIN)) as http:
        answer = await http.post(PATH, json={"url": URL}, headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["code"]) == (400, "idempotency_not_supported")
        assert (await http.get(PATH)).json()["items"] == []
        made = (await http.post(PATH, json={"url": URL})).json()
        everything = [await http.get(PATH), await http.get(f"{PATH}/{made['id']}")]
    assert all(made["secret"] not in answer.text for answer in everything)
    assert all("ciphertext" not in answer.text for answer in everything)


async def test_a_deletion_is_repeated_under_its_key(hooked: Hooked) -> None:
    """The same answer again; without the key the second is 404."""
    made = hooked.create(URL)
    async with hooked.world.http(hooked.world.secret(Role.ADMIN)) as http:
        answers = [await http.delete(f"{PATH}/{made.id}", headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].content == answers[1].content
        assert (await http.delete(f"{PATH}/{made.id}")).status_code == 404


@pytest.mark.parametrize("database", ["sqlite"])  # none of it gets that far
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"url": "http://receiver.test/"}, "url_refused"),
        ({"url": "https://user:password@receiver.test/"}, "url_refused"),
        ({"url": "https://169.254.169.254/latest/meta-data/"}, "url_refused"),
        ({"url": "https://[::ffff:127.0.0.1]/"}, "url_refused"),
        ({"url": "https://2130706433/"}, "url_refused"),
        ({"url": "https://receiver.test:22/"}, "url_refused"),
        ({"url": "https://receiver.test/" + "a" * 2000}, "invalid_request"),
        ({"url": ""}, "invalid_request"),
        ({"url": URL, "events": []}, "invalid_request"),
        ({"url": URL, "events": ["key.exploded"]}, "invalid_request"),
        ({"url": URL, "secret": "whsec_mine"}, "invalid_request"),
        ({"events": ["key.retired"]}, "invalid_request"),
    ],
)
async def test_what_is_refused_at_the_creation(hooked: Hooked, body: dict[str, Any], code: str) -> None:
    """With 422 and a reason, and nothing of a password in it."""
    async with hooked.world.http(hooked.world.secret(Role.ADMIN)) as http:
        answer = await http.post(PATH, json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert "password" not in answer.text
        assert (await http.get(PATH)).json()["items"] == []


async def test_a_name_inside_is_refused_like_an_address_inside(hooked: Hooked) -> None:
    """Without permission, loopback is refused by name too."""
    hooked.world.app.state.webhook_guard = Guard(lambda *_: ["127.0.0.1"])
    async with hooked.world.http(hooked.world.secret(Role.ADMIN)) as http:
        assert (await http.post(PATH, json={"url": URL})).json()["code"] == "url_refused"


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_another_tenant_s_webhooks_do_not_exist(hooked: Hooked, method: str, path: str) -> None:
    """Neither by its path nor by its id under one's own path."""
    hooked.world.model("globex")
    made = hooked.create(URL)
    async with hooked.world.http(hooked.world.secret(Role.ADMIN, "globex")) as http:
        own = path.replace("acme", "globex")
        answers = [await http.request(method, path.format(id=made.id), json={"url": URL})]
        if "{id}" in path:
            answers.append(await http.request(method, own.format(id=made.id), json={"url": URL}))
    assert {answer.status_code for answer in answers} == {404}
    assert hooked.webhook(made.id).enabled


@pytest.mark.parametrize("database", ["sqlite"])  # none of it gets that far
@pytest.mark.parametrize("hostile", ["..", "%2e%2e", "a%2Fb", "%00", "*", "é", "x" * 1000, "WHK_1", " "])
async def test_a_hostile_id_is_no_id(hooked: Hooked, hostile: str) -> None:
    """4xx each time."""
    async with hooked.world.http(hooked.world.secret(Role.ADMIN)) as http:
        for method, path in ROUTES[2:]:
            answer = await http.request(method, path.format(id=hostile))
            assert 400 <= answer.status_code < 500


async def test_a_webhook_too_many_is_refused(hooked: Hooked) -> None:
    """409, since waiting does not help."""
    hooked.world.do(quotas.update, "acme", TenantQuotaPatch(webhooks=2))
    async with hooked.world.client(Role.ADMIN) as keys:
        made = [await keys.create_webhook("acme", WebhookCreate(url=URL)) for _ in range(2)]
        with pytest.raises(errors.Conflict) as caught:
            await keys.create_webhook("acme", WebhookCreate(url=URL))
        assert caught.value.code == "quota_exceeded"
        await keys.delete_webhook("acme", made[0].id)
        await keys.create_webhook("acme", WebhookCreate(url=URL))
        assert len((await keys.list_webhooks("acme")).items) == 2


async def test_the_audit_log_names_the_host_only(hooked: Hooked) -> None:
    """The path of a URL may be a secret of the receiver's."""
    async with hooked.world.client(Role.ADMIN) as keys:
        made = await keys.create_webhook("acme", WebhookCreate(url=URL + "/token-1234"))
        await keys.send_test_event("acme", made.id)
        await keys.delete_webhook("acme", made.id)
        rows = [row async for row in aeverything(keys.audit, "acme")]
    assert [row.action for row in rows if row.subject == made.id] == [
        "webhook.create",
        "webhook.test",
        "webhook.delete",
    ]
    assert all("token-1234" not in row.model_dump_json() for row in rows)
