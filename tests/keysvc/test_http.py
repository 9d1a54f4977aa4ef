"""What holds for every answer: problems, idempotency, preconditions, pages, limits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlmodel import select

from anamorph import errors
from anamorph.wire.admin import Role, RotationPolicyPatch, TenantCreate
from anamorph.wire.audit import first_break
from anamorph.wire.keyservice import aeverything
from anamorph.wire.states import State
from anamorph_keysvc.database import Database
from anamorph_keysvc.idempotency import forget_old
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.tables import Answer

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

MODEL = "/v1/tenants/acme/models/chat"


def problem_of(response: httpx.Response) -> dict[str, Any]:
    """The body of a problem, which every error must be."""
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == response.status_code
    assert {"type", "title", "detail"} <= set(body)
    return body


@pytest.mark.parametrize(
    ("method", "path", "content", "expected"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", MODEL + "/keys/1:suspend", None, 405),
        ("DELETE", MODEL, None, 405),
        ("GET", "/v1/tenants/acme/models/none", None, 404),
        ("GET", "/v1/tenants/acme/models/UPPER", None, 422),
        ("GET", "/v1/tenants/acme/models/v1", None, 422),
        ("GET", MODEL + "/keys/99999999999999999999", None, 422),
        ("GET", MODEL + "/keys/0", None, 422),
        ("GET", MODEL + "/keys?page=nonsense", None, 400),
        ("GET", MODEL + "/keys?page=WyJhIl0=", None, 400),
        ("GET", MODEL + "/keys?limit=0", None, 422),
        ("POST", "/v1/tenants/acme/models", b"{", 422),
        ("POST", "/v1/tenants/acme/models", b"\xff", 400),
        ("POST", "/v1/tenants/acme/models", b'{"id": "x", "surprise": 1}', 422),
        ("POST", "/v1/tenants/acme/api-keys", b'{"name": "n", "role": "god"}', 422),
        ("POST", "/v1/tenants/acme/models", b" " * (2**20 + 1), 413),
        ("POST", MODEL + "/keys/1:suspend", None, 404),
    ],
)
async def test_every_error_is_a_problem(
    world: World, method: str, path: str, content: bytes | None, expected: int
) -> None:
    """The framework's own errors too come as ``application/problem+json`` with the right status."""
    world.model()
    async with world.http(world.secret(Role.ADMIN)) as http:
        headers = {"Content-Type": "application/json"} if content else {}
        response = await http.request(method, path, content=content, headers=headers)
    assert response.status_code == expected
    problem_of(response)


async def test_a_body_that_does_not_announce_its_size_is_cut_off_too(world: World) -> None:
    """Sent in chunks without a length, a body that is too large is a 413 all the same."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 2**16

    async with world.http(world.secret(Role.PLATFORM)) as http:
        response = await http.post(
            "/v1/tenants", content=chunks(), headers={"Content-Type": "application/json"}
        )
    assert problem_of(response)["code"] == "body_too_large"


async def test_a_problem_names_the_field_but_not_what_it_held(world: World) -> None:
    """A value sent by mistake, perhaps a secret, does not come back in the error."""
    world.model()
    async with world.http(world.secret(Role.ADMIN)) as http:
        response = await http.post("/v1/tenants/acme/api-keys", json={"name": "n", "role": "SECRET-VALUE"})
    body = problem_of(response)
    assert body["param"] == "body.role"
    assert "SECRET-VALUE" not in response.text


async def test_an_unexpected_failure_tells_nothing_of_the_inside(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A 500 is a problem without detail, and neither it nor the log quotes what failed."""
    world.model()
    token = world.secret(Role.ADMIN)
    world.sql("""UPDATE model SET policy = '"BROKEN"'""")
    async with world.http(token) as http:
        response = await http.get(MODEL)
    assert problem_of(response)["status"] == 500
    assert "BROKEN" not in response.text + caplog.text


async def test_no_answer_may_be_cached(world: World) -> None:
    """Every answer, error or not, says ``no-store``."""
    async with world.http() as http:
        for path in ("/livez", "/v1/tenants", "/nowhere"):
            assert (await http.get(path)).headers["cache-control"] == "no-store"


async def rotate(world: World, headers: dict[str, str], body: bytes = b"") -> httpx.Response:
    async with world.http(world.secret(Role.ROTATOR)) as http:
        return await http.post(MODEL + "/keys:rotate", content=body, headers=headers)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another task or thread brings about."""
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


async def test_the_same_idempotency_key_gives_the_same_answer_and_does_the_work_once(world: World) -> None:
    """Sent again, a rotation answers with the operation of the first time."""
    world.model()
    first = await rotate(world, {"Idempotency-Key": "once"})
    again = await rotate(world, {"Idempotency-Key": "once"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert (await rotate(world, {"Idempotency-Key": "twice"})).status_code == 409


async def test_an_idempotency_key_used_for_another_request_is_refused(world: World) -> None:
    """Other path, other body or other precondition under the same key: 422."""
    world.model()
    await rotate(world, {"Idempotency-Key": "once"})
    other_body = await rotate(world, {"Idempotency-Key": "once"}, b" ")
    other_match = await rotate(world, {"Idempotency-Key": "once", "If-Match": '"1"'})
    for response in (other_body, other_match):
        assert response.status_code == 422
        assert problem_of(response)["code"] == "idempotency_key_reused"


async def test_idempotency_keys_of_two_callers_do_not_meet(world: World) -> None:
    """A key is its caller's own: the other caller's request is done, not answered from memory."""
    for tenant in ("acme", "globex"):
        world.model(tenant)
    answers = []
    for tenant in ("acme", "globex"):
        async with world.client(Role.ADMIN, tenant) as client:
            answers.append(await client.rotate(tenant, "chat", idempotency_key="same"))
    assert [answer.tenant for answer in answers] == ["acme", "globex"]


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "\u00e9"])
async def test_a_malformed_idempotency_key_is_refused(world: World, key: str) -> None:
    """Only printable characters, and not too many."""
    world.model()
    async with world.http(world.secret(Role.ROTATOR)) as http:
        headers = [(b"Idempotency-Key", key.encode())]
        response = await http.post(MODEL + "/keys:rotate", headers=headers)
    assert problem_of(response)["code"] == "invalid_idempotency_key"


async def test_a_request_still_running_under_the_key_is_a_conflict_to_come_back_from(world: World) -> None:
    """409 with Retry-After while the first is at work, and its answer afterwards."""
    world.model()
    world.secret(Role.ROTATOR)
    with world.service.work("test", PLATFORM):  # the write lock is taken: the first request has to wait
        first = asyncio.create_task(rotate(world, {"Idempotency-Key": "k"}))
        await until(lambda: bool(world.app.state.in_flight._keys))
        second = await rotate(world, {"Idempotency-Key": "k"})
    assert problem_of(second)["code"] == "request_in_flight"
    assert second.headers["retry-after"] == "1"
    done = await first
    assert done.json() == (await rotate(world, {"Idempotency-Key": "k"})).json()


async def test_answers_with_secrets_are_never_stored(world: World) -> None:
    """Calls that answer a secret refuse the header, and nothing of them is kept."""
    world.model()
    version = world.staged()
    admin, platform = world.secret(Role.ADMIN), world.secret(Role.PLATFORM)
    calls = [
        (admin, "/v1/tenants/acme/api-keys", {"name": "n", "role": "client"}),
        (admin, f"{MODEL}/keys/{version}:release", {"purpose": "client"}),
        (platform, f"{MODEL}/keys/{version}:materialize", None),
        (admin, f"{MODEL}/inference-tokens", None),
    ]
    for token, path, body in calls:
        async with world.http(token) as http:
            response = await http.post(path, json=body, headers={"Idempotency-Key": "k"})
        assert problem_of(response)["code"] == "idempotency_not_supported", path
    with world.service.database.read(PLATFORM) as session:
        assert session.exec(select(Answer)).all() == []


async def test_stored_answers_are_forgotten_after_their_time(world: World) -> None:
    """The table of answers does not grow for ever."""
    world.model()
    await rotate(world, {"Idempotency-Key": "k"})
    forget_old(world.service)
    assert (await rotate(world, {"Idempotency-Key": "k"})).status_code == 202
    world.clock.advance(world.service.limits.idempotency_ttl_s + 1)
    forget_old(world.service)
    assert (await rotate(world, {"Idempotency-Key": "k"})).status_code == 409


async def test_if_match_protects_against_a_change_since_the_read(world: World) -> None:
    """The ETag that was read is accepted once; afterwards it is 412."""
    world.model()
    version = world.active()
    async with world.http(world.secret(Role.ADMIN)) as http:
        tag = (await http.get(f"{MODEL}/keys/{version}")).headers["etag"]
        first = await http.post(f"{MODEL}/keys/{version}:suspend", headers={"If-Match": tag})
        stale = await http.post(f"{MODEL}/keys/{version}:resume", headers={"If-Match": tag})
        fresh = {"If-Match": first.headers["etag"]}
        assert (await http.post(f"{MODEL}/keys/{version}:resume", headers=fresh)).status_code == 200
        malformed = await http.post(f"{MODEL}/keys/{version}:suspend", headers={"If-Match": "W/3"})
    assert first.headers["etag"] != tag
    assert problem_of(stale)["status"] == 412
    assert problem_of(malformed)["code"] == "invalid_if_match"


async def test_pages_run_through_everything_once(world: World) -> None:
    """However small the pages: every item, in order, none twice, while others are added."""
    world.model()
    for _ in range(5):
        world.active()
    async with world.http(world.secret(Role.ADMIN)) as http:
        seen, page = [], None
        while True:
            params = {"limit": 2} | ({"page": page} if page else {})
            body = (await http.get(MODEL + "/keys", params=params)).json()
            seen += [item["version"] for item in body["items"]]
            page = body["next_page"]
            if page is None:
                break
    assert seen == [1, 2, 3, 4, 5]


async def test_the_audit_log_read_over_the_wire_is_an_unbroken_chain(world: World) -> None:
    """What a tenant's auditor downloads verifies without the service."""
    world.model()
    world.active()
    async with world.client(Role.AUDITOR) as auditor:
        rows = [row async for row in aeverything(auditor.audit, "acme")]
    assert first_break(rows, tenant="acme") is None
    assert [row.action for row in rows][-3:] == ["stage", "activate", "api-key.create"]


async def test_the_operators_view_holds_all_tenants_and_filters_by_state(world: World) -> None:
    """Versions and models of every tenant, by state if asked."""
    for tenant in ("acme", "globex"):
        world.model(tenant)
        world.active(tenant)
    world.rotate("globex")
    async with world.client(Role.PLATFORM) as platform:
        assert len([row async for row in aeverything(platform.all_versions)]) == 3
        pending = await platform.all_versions(states={State.PENDING})
        assert [row.version for row in pending.items] == [2]
        both = await platform.all_versions(states={State.PENDING, State.ACTIVE})
        assert [f"{row.tenant}.v{row.version}" for row in both.items] == ["acme.v1", "globex.v1", "globex.v2"]
        assert {row.tenant async for row in aeverything(platform.all_models)} == {"acme", "globex"}


async def test_a_policy_whose_grace_is_too_short_for_its_clients_is_refused(world: World) -> None:
    """Grace covers cache, longest request, skew and propagation; null switches a trigger off."""
    world.model(period_s=3600)
    async with world.client(Role.ADMIN) as admin:
        with pytest.raises(errors.Unprocessable, match="grace_s must be at least 22"):
            await admin.update_policy("acme", "chat", RotationPolicyPatch(grace_s=21))
        with pytest.raises(errors.Unprocessable):
            await admin.update_policy("acme", "chat", RotationPolicyPatch(grace_s=None))
        changed = await admin.update_policy("acme", "chat", RotationPolicyPatch(period_s=None, grace_s=22))
        assert (changed.period_s, changed.grace_s) == (None, 22)
        assert await admin.get_policy("acme", "chat") == changed


async def test_what_exists_is_not_created_again(world: World) -> None:
    """A second tenant of the same id is a conflict."""
    async with world.client(Role.PLATFORM) as platform:
        assert (await platform.create_tenant(TenantCreate(id="acme"))).created_at == world.clock.now
        with pytest.raises(errors.Conflict, match="exists"):
            await platform.create_tenant(TenantCreate(id="acme"))


async def test_sixty_four_rotations_at_once_make_one_version(world: World) -> None:
    """Of 64 concurrent rotations one wins; the others are told of it."""
    world.model()
    async with world.client(Role.ADMIN) as admin:
        answers = await asyncio.gather(
            *(admin.rotate("acme", "chat") for _ in range(64)), return_exceptions=True
        )
        assert len((await admin.list_versions("acme", "chat")).items) == 1
    won = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(won) == 1
    lost = [answer for answer in answers if isinstance(answer, errors.Conflict)]
    assert {error.code for error in lost} == {"rotation_in_flight"}
    assert len(lost) == 63


def test_sixty_four_threads_at_once_make_one_version(world: World) -> None:
    """The same below HTTP: the database lets one through."""
    world.model()
    barrier, won, lost = threading.Barrier(64), [], []

    def rotate_once() -> None:
        barrier.wait()
        try:
            won.append(world.rotate())
        except errors.Conflict as error:
            lost.append(error)

    threads = [threading.Thread(target=rotate_once) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (won, len(lost)) == ([1], 63)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_busy_database_is_a_503_to_come_back_from(world: World) -> None:
    """A writer that cannot have the lock in time gives up without a trace and says when to return."""
    world.model()
    token = world.secret(Role.ROTATOR)
    impatient = Database.sqlite(world.home.database, busy_timeout_s=0.01)
    world.app.state.service = replace(world.service, database=impatient)
    async with world.http(token) as http:
        with world.service.work("test", PLATFORM):
            response = await http.post(MODEL + "/keys:rotate")
        assert problem_of(response)["code"] == "busy"
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert (await http.post(MODEL + "/keys:rotate")).json()["version"] == 1
    impatient.close()


async def test_health_and_metrics_answer_without_credentials(world: World) -> None:
    """Liveness, readiness, and counts by state; no tenant's name in the metrics."""
    world.model()
    world.active()
    async with world.http() as http:
        assert (await http.get("/livez")).json() == {"status": "alive"}
        assert (await http.get("/readyz")).json() == {"status": "ready"}
        metrics = (await http.get("/metrics")).text
    assert 'anamorph_keysvc_versions{anamorph_state="ACTIVE"} 1.0' in metrics
    assert "acme" not in metrics


async def test_releases_and_denials_are_counted(world: World) -> None:
    """One of each, and the metrics say so."""
    world.model()
    version = world.staged()
    async with world.client(Role.CLIENT) as client, world.http() as http:
        await client.release("acme", "chat", version, "client")
        with pytest.raises(errors.NotFound):
            await client.release("acme", "chat", 99, "client")
        metrics = (await http.get("/metrics")).text
    assert 'anamorph_keysvc_releases_total{anamorph_purpose="client",anamorph_source="cached"} 1.0' in metrics
    assert 'anamorph_keysvc_denials_total{error_type="not_found"} 1.0' in metrics


async def test_the_openapi_document_covers_every_route(world: World) -> None:
    """The contract is served: each path with a name of its own, errors as problems."""
    async with world.http() as http:
        document = (await http.get("/openapi.json")).json()
    operations = [item for path in document["paths"].values() for item in path.values()]
    names = [item["operationId"] for item in operations]
    assert len(names) == len(set(names)) > 30
    errors = [answer for item in operations for status, answer in item["responses"].items() if status > "4"]
    named = {answer["$ref"].removeprefix("#/components/responses/") for answer in errors}
    assert all(
        "application/problem+json" in document["components"]["responses"][name]["content"] for name in named
    )


async def test_an_if_match_that_would_not_be_compared_is_refused(world: World) -> None:
    """Whoever sends one relies on it; nothing is done then."""
    world.model()
    async with world.http(world.secret(Role.ADMIN)) as http:
        answer = await http.post("/v1/tenants/acme/models/chat/keys:rotate", headers={"If-Match": '"3"'})
        assert (answer.status_code, answer.json()["code"]) == (400, "if_match_not_supported")
        versions = await http.get("/v1/tenants/acme/models/chat/keys")
    assert versions.json()["items"] == []
