"""The clients in ``anamorph.wire.keyservice``: twins, retries, and what they make of odd answers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from anamorph import errors
from anamorph.wire import admin, keyservice
from anamorph.wire.credential import Credential
from anamorph.wire.keyservice import AsyncKeyService, KeyService

Answers = list[httpx.Response | type[httpx.TransportError]]

TENANT = {"id": "acme", "display_name": "", "created_at": "2030-01-01T00:00:00Z"}
SAMPLES: dict[str, Any] = {
    "tenant": "acme",
    "model": "chat",
    "version": 3,
    "key_id": "key_1",
    "operation": "op_1",
    "webhook": "whk_1",
    "purpose": "client",
    "key": admin.ApiKeyCreate(name="n", role=admin.Role.CLIENT),
    "patch": admin.RotationPolicyPatch(period_s=None, grace_s=900),
    "progress": admin.Progress(phase="p", done=0.5),
    "materialized": admin.Materialized(
        replica="r", manifest_sha256="0" * 64, probe=admin.Probe(prompts=((1,),), expected=((2,),))
    ),
    "failure": admin.Failure(reason="r"),
    "activation": admin.Activation(endpoint="http://e"),
    "address": admin.Address(endpoint="http://e"),
    "body": admin.BackupCreate(taken_at=datetime(2030, 1, 1, tzinfo=UTC)),
    "report": admin.UsageReport(source="s", tokens=1),
}
CREATED: dict[str, dict[str, Any]] = {
    "create_tenant": {"tenant": admin.TenantCreate(id="acme")},
    "create_model": {"model": admin.ModelCreate(id="chat", base="b", vocab_size=9, context_length=9)},
    "update_model": {"patch": admin.ModelPatch(dtype="float32", base_digest=None)},
    "create_webhook": {"webhook": admin.WebhookCreate(url="https://receiver.test")},
}


def scripted(answers: Answers, seen: list[httpx.Request]) -> Callable[[httpx.Request], httpx.Response]:
    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, httpx.Response):
            return answer
        raise answer("broken", request=request)

    return handle


def missing(request: httpx.Request, seen: list[httpx.Request]) -> httpx.Response:
    seen.append(request)
    return httpx.Response(404, json={"detail": "none"})


def client_of(answers: Answers, seen: list[httpx.Request], pauses: list[float]) -> KeyService:
    transport = httpx.MockTransport(scripted(answers, seen))
    return KeyService("http://keysvc", "amk_x", transport=transport, sleep=pauses.append)


def methods() -> list[str]:
    public = [name for name, _ in inspect.getmembers(KeyService, inspect.isfunction) if name[0] != "_"]
    return [name for name in public if name != "close"]


@pytest.mark.parametrize("name", methods())
async def test_the_async_twin_sends_what_the_sync_client_sends(name: str) -> None:
    """Same signature, same request, method by method."""
    sync, twin = getattr(KeyService, name), getattr(AsyncKeyService, name)
    assert inspect.signature(sync) == inspect.signature(twin)
    wanted = [p.name for p in inspect.signature(sync).parameters.values() if p.default is p.empty][1:]
    arguments = {argument: SAMPLES[argument] for argument in wanted} | CREATED.get(name, {})
    seen: list[httpx.Request] = []
    transport = httpx.MockTransport(lambda request: missing(request, seen))
    with KeyService("http://keysvc", "t", transport=transport) as keys, pytest.raises(errors.NotFound):
        sync(keys, **arguments)
    async with AsyncKeyService("http://keysvc", "t", transport=transport) as akeys:
        with pytest.raises(errors.NotFound):
            await twin(akeys, **arguments)
    one, other = seen
    assert (one.method, one.url, _body(one)) == (other.method, other.url, _body(other))
    assert set(one.headers) == set(other.headers)


def _body(request: httpx.Request) -> Any:
    """Without the recipient of a release, which is a fresh key each time."""
    body = json.loads(request.content or b"null")
    return {**body, "recipient": None} if body and "recipient" in body else body


@pytest.mark.parametrize("kind", [str, Path, Callable])
async def test_both_twins_show_the_credential_that_is_there_now(kind: type, tmp_path: Path) -> None:
    """A file or function is asked for each request, so what Kubernetes has replaced is shown from then on."""
    file = tmp_path / "token"
    file.write_text("token-one\n")
    kinds: dict[object, Credential] = {
        str: "token-one",
        Path: file,
        Callable: lambda: file.read_text().strip(),
    }
    credential = kinds[kind]
    seen: list[httpx.Request] = []
    transport = httpx.MockTransport(lambda request: missing(request, seen))
    with KeyService("http://keysvc", credential, transport=transport) as keys:
        for token in ("token-one", "token-two"):
            file.write_text(token)
            with pytest.raises(errors.NotFound):
                keys.get_tenant("acme")
    async with AsyncKeyService("http://keysvc", credential, transport=transport) as akeys:
        for token in ("token-two", "token-three"):
            file.write_text(token)
            with pytest.raises(errors.NotFound):
                await akeys.get_tenant("acme")
    shown = [request.headers["authorization"].removeprefix("Bearer token-") for request in seen]
    assert shown == (["one"] * 4 if kind is str else ["one", "two", "two", "three"])


def test_a_second_attempt_shows_the_credential_of_then(tmp_path: Path) -> None:
    """A pause may be longer than what is left of a token."""
    file = tmp_path / "token"
    file.write_text("token-one")
    seen: list[httpx.Request] = []
    answers: Answers = [httpx.ConnectError, httpx.Response(200, json=TENANT)]
    transport = httpx.MockTransport(scripted(answers, seen))

    def replaced(_pause: float) -> None:
        file.write_text("token-two")

    with KeyService("http://keysvc", file, transport=transport, sleep=replaced) as keys:
        keys.get_tenant("acme")
    assert [request.headers["authorization"] for request in seen] == ["Bearer token-one", "Bearer token-two"]


@pytest.mark.parametrize("content", [None, "", " \n", "two words", "two\nlines--", "not-äscii", "x" * 20_000])
async def test_a_file_without_a_credential_sends_nothing(content: str | None, tmp_path: Path) -> None:
    """It is named, and its content is not; nothing else is shown in its place."""
    file, seen = tmp_path / "token", list[httpx.Request]()
    if content is not None:
        file.write_text(content)
    transport = httpx.MockTransport(lambda request: missing(request, seen))
    with (
        KeyService("http://keysvc", file, transport=transport) as keys,
        pytest.raises(errors.SetupError, match=re.escape(str(file))) as caught,
    ):
        keys.get_tenant("acme")
    async with AsyncKeyService("http://keysvc", file, transport=transport) as akeys:
        with pytest.raises(errors.SetupError):
            await akeys.get_tenant("acme")
    assert seen == []
    assert not content or content.strip() == "" or content not in str(caught.value)


def test_no_credential_is_none() -> None:
    """The calls that need none send none."""
    seen: list[httpx.Request] = []
    transport = httpx.MockTransport(scripted([httpx.Response(200, json={"keys": []})], seen))
    with KeyService("http://keysvc", transport=transport) as keys:
        keys.inference_keys()
    assert "authorization" not in seen[0].headers


def test_a_read_is_repeated_after_what_may_pass() -> None:
    """A lost connection and a 503 are tried again, with growing pauses or as long as asked."""
    seen: list[httpx.Request] = []
    pauses: list[float] = []
    busy = httpx.Response(503, headers={"Retry-After": "2"}, json={"detail": "busy"})
    with client_of([httpx.ConnectError, busy, httpx.Response(200, json=TENANT)], seen, pauses) as keys:
        assert keys.get_tenant("acme").id == "acme"
    assert pauses == [0.2, 2.0]


def test_a_change_is_repeated_under_one_idempotency_key() -> None:
    """The service can tell the second attempt from a second rotation."""
    seen: list[httpx.Request] = []
    with client_of([httpx.ReadTimeout], seen, []) as keys, pytest.raises(errors.Unavailable) as refused:
        keys.rotate("acme", "chat")
    assert refused.value.code == "no_answer"
    assert len(seen) == 4
    assert len({request.headers["idempotency-key"] for request in seen}) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda keys: keys.create_api_key("acme", admin.ApiKeyCreate(name="n", role=admin.Role.CLIENT)),
        lambda keys: keys.release("acme", "chat", 1, "materialize"),
    ],
)
def test_what_may_not_happen_twice_is_sent_once(call: Callable[[KeyService], object]) -> None:
    """A new secret or a single-use release is not repeated by the client on its own."""
    seen: list[httpx.Request] = []
    with client_of([httpx.ReadTimeout], seen, []) as keys, pytest.raises(errors.Unavailable):
        call(keys)
    assert len(seen) == 1


def test_a_conflict_is_repeated_only_while_our_own_first_attempt_is_running() -> None:
    """``request_in_flight`` is worth waiting for; any other conflict is an answer."""
    for code, attempts in (("request_in_flight", 4), ("rotation_in_flight", 1)):
        seen: list[httpx.Request] = []
        conflict = httpx.Response(409, json={"detail": "d", "code": code})
        with client_of([conflict], seen, []) as keys, pytest.raises(errors.Conflict):
            keys.rotate("acme", "chat")
        assert len(seen) == attempts, code


def test_an_answer_of_another_shape_is_an_error_that_does_not_quote_it() -> None:
    """A message that does not parse may hold a secret; the error says which call it was."""
    answer = httpx.Response(200, json={"secret": "SECRET-VALUE"})
    with client_of([answer], [], []) as keys, pytest.raises(errors.ServiceError) as refused:
        keys.release("acme", "chat", 1, "client")
    assert "ReleaseRead" in str(refused.value)
    assert "SECRET" not in repr(refused.value) + str(refused.value.__cause__)


def test_a_redirect_is_not_followed() -> None:
    """The credential goes to the address that was configured and nowhere else."""
    seen: list[httpx.Request] = []
    redirect = httpx.Response(307, headers={"Location": "http://elsewhere/"})
    with client_of([redirect], seen, []) as keys, pytest.raises(errors.ServiceError):
        keys.get_tenant("acme")
    assert [request.url.host for request in seen] == ["keysvc"]


def test_everything_runs_through_all_pages() -> None:
    """Pages are asked for until there is no next one."""
    seen: list[httpx.Request] = []
    pages: Answers = [
        httpx.Response(200, json={"items": [TENANT], "next_page": "p2"}),
        httpx.Response(200, json={"items": [TENANT, TENANT]}),
    ]
    with client_of(pages, seen, []) as keys:
        assert len(list(keyservice.everything(keys.list_tenants))) == 3
    assert [dict(request.url.params) for request in seen] == [{}, {"page": "p2"}]
