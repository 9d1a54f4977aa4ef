"""Service-account tokens, reviewed by a real API server: bound accounts are their tenant's, others nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kubernetes.client import ApiException
from tests.servers.kube import ISSUER, ApiServer, write_certificates

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc import deadline
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.identity.bearer import Identity
from anamorph_keysvc.identity.settings import KubernetesSettings
from anamorph_keysvc.identity.workloads import Workloads

if TYPE_CHECKING:
    from tests.keysvc.identity.conftest import Ticks

pytestmark = pytest.mark.real

AUDIENCE = "anamorph-keysvc"
BINDINGS = [
    {"namespace": "acme-jobs", "service_account": "*", "tenant": "acme"},
    {"namespace": "acme-jobs", "service_account": "auditor", "tenant": "acme", "role": "auditor"},
    {"namespace": "anamorph", "service_account": "operator", "role": "platform"},
    {"namespace": "folds", "service_account": "materializer-*", "tenant_from": "name"},
    {"namespace": "folds", "service_account": "materializer-initech", "tenant": "acme", "role": "auditor"},
    {"namespace": "folds", "service_account": "*", "tenant": "acme", "role": "client"},
]
TENANTS = {"acme", "globex", "initech"}


@pytest.fixture(scope="session")
def own_token(apiserver: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token of a service account that may review tokens."""
    name = apiserver.account("keysvc")
    apiserver.allow_reviews("keysvc", name)
    file = tmp_path_factory.mktemp("own") / "token"
    file.write_text(apiserver.token("keysvc", name) + "\n")
    return file


@pytest.fixture
def reviewing(apiserver: ApiServer, own_token: Path, ticks: Ticks) -> Iterator[Callable[..., Workloads]]:
    """Makes workloads of the API server, with settings changed as wanted."""
    made: list[Workloads] = []

    def make(*, now: Callable[[], float] = time.time, **changed: Any) -> Workloads:
        good = {
            "api_server": apiserver.url,
            "ca_file": apiserver.ca_file,
            "token_file": own_token,
            "issuer": ISSUER,
            "audiences": [AUDIENCE, "keysvc-too"],
            "bindings": BINDINGS,
            "timeout_s": 10,
        }
        settings = KubernetesSettings.model_validate({**good, **changed})
        made.append(Workloads(settings, exists=TENANTS.__contains__, clock=ticks, now=now))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def workloads(reviewing: Callable[..., Workloads]) -> Workloads:
    return reviewing()


@pytest.fixture
def job(apiserver: ApiServer) -> str:
    """A service account of a job of acme."""
    return apiserver.account("acme-jobs")


def refused(workloads: Workloads, token: str) -> str:
    with pytest.raises(errors.Unauthenticated) as caught:
        workloads.authenticate(token)
    return str(caught.value)


def unavailable(workloads: Workloads, token: str) -> str:
    with pytest.raises(errors.Unavailable) as caught:
        workloads.authenticate(token)
    assert token not in str(caught.value)
    return str(caught.value)


def await_refusal(workloads: Workloads, token: str, ticks: Ticks) -> None:
    """Come back, each time after the cache's time, until the token is refused."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            workloads.authenticate(token)
        except errors.Unauthenticated:
            return
        ticks.now += 60
        time.sleep(0.2)
    pytest.fail("the token of a deleted account is still taken")


def test_bound_namespace(workloads: Workloads, apiserver: ApiServer, job: str) -> None:
    """Any account of a bound namespace is a materializer of its tenant."""
    caller = workloads.authenticate(apiserver.token("acme-jobs", job, [AUDIENCE]))
    assert caller == Caller(f"kubernetes:acme-jobs:{job}", Role.MATERIALIZER, "acme")


def test_bound_account(workloads: Workloads, apiserver: ApiServer) -> None:
    """An account's own binding stands before that of its namespace."""
    token = apiserver.token("acme-jobs", apiserver.account("acme-jobs", "auditor"), ["keysvc-too"])
    assert workloads.authenticate(token).role is Role.AUDITOR


def test_operator(workloads: Workloads, apiserver: ApiServer) -> None:
    """The platform role has no tenant."""
    token = apiserver.token("anamorph", apiserver.account("anamorph", "operator"), [AUDIENCE])
    assert workloads.authenticate(token) == Caller("kubernetes:anamorph:operator", Role.PLATFORM, None)


def of_folds(apiserver: ApiServer, name: str) -> str:
    """A token of a service account in the namespace for jobs."""
    with suppress(ApiException):  # another test has made it
        apiserver.account("folds", name)
    return apiserver.token("folds", name, [AUDIENCE])


@pytest.mark.parametrize(
    ("account", "role", "tenant"),
    [
        ("materializer-acme", Role.MATERIALIZER, "acme"),
        ("materializer-globex", Role.MATERIALIZER, "globex"),
        ("materializer-initech", Role.AUDITOR, "acme"),
        ("another", Role.CLIENT, "acme"),
        ("materializer", Role.CLIENT, "acme"),
    ],
)
def test_tenant_from_the_name(
    workloads: Workloads, apiserver: ApiServer, account: str, role: Role, tenant: str
) -> None:
    """A name's end says the tenant; an account's own binding goes before that, its namespace's after."""
    caller = workloads.authenticate(of_folds(apiserver, account))
    assert caller == Caller(f"kubernetes:folds:{account}", role, tenant)


@pytest.mark.parametrize("account", ["materializer-nobody", "materializer-a.b", "materializer-plaintext"])
def test_names_of_no_tenant(workloads: Workloads, apiserver: ApiServer, account: str) -> None:
    """Answered as an unbound account is, not taken for the namespace's: nobody learns who is a tenant."""
    unbound = apiserver.token("elsewhere", apiserver.account("elsewhere"), [AUDIENCE])
    assert refused(workloads, of_folds(apiserver, account)) == refused(workloads, unbound)


def test_a_tenant_of_today(reviewing: Callable[..., Workloads], apiserver: ApiServer) -> None:
    """That there was no such tenant is not remembered: its first job may begin as soon as it is made."""
    tenants: set[str] = set()
    workloads = Workloads(reviewing().settings, exists=tenants.__contains__)
    token = of_folds(apiserver, "materializer-acme")
    refused(workloads, token)
    tenants.add("acme")
    assert workloads.authenticate(token).tenant == "acme"
    workloads.close()


def test_whether_a_tenant_exists_is_for_genuine_tokens_only(
    reviewing: Callable[..., Workloads], apiserver: ApiServer
) -> None:
    """A forged token is refused by the API server before its tenant is looked up."""
    asked: list[str] = []
    genuine = of_folds(apiserver, "materializer-acme")
    head, claims, _ = genuine.split(".")
    forged = f"{head}.{claims}.{of_folds(apiserver, 'materializer-globex').split('.')[2]}"
    settings = reviewing().settings

    def exists(tenant: str) -> bool:
        asked.append(tenant)
        return True

    workloads = Workloads(settings, exists=exists)
    refused(workloads, forged)
    assert asked == []
    assert workloads.authenticate(genuine).tenant == "acme"
    assert asked == ["acme"]
    workloads.close()


def test_wrong_audience(workloads: Workloads, apiserver: ApiServer, job: str) -> None:
    """A token for the API server, or for another service, is not for us."""
    for audiences in ([], ["another"]):
        refused(workloads, apiserver.token("acme-jobs", job, audiences))


def test_unbound(workloads: Workloads, apiserver: ApiServer, job: str) -> None:
    """A genuine token of an account that is bound to nothing is answered as any bad one."""
    unbound = apiserver.token("elsewhere", apiserver.account("elsewhere"), [AUDIENCE])
    wrong = apiserver.token("acme-jobs", job, ["another"])
    assert refused(workloads, unbound) == refused(workloads, wrong)
    other = apiserver.token("anamorph", apiserver.account("anamorph"), [AUDIENCE])
    refused(workloads, other)


@pytest.mark.slow
def test_deleted_account(
    reviewing: Callable[..., Workloads], apiserver: ApiServer, job: str, ticks: Ticks
) -> None:
    """With its account a token ends; what was reviewed before is forgotten within the cache's time."""
    workloads, token = reviewing(cache_s=60), apiserver.token("acme-jobs", job, [AUDIENCE])
    caller = workloads.authenticate(token)
    apiserver.delete_account("acme-jobs", job)
    assert workloads.authenticate(token) == caller
    ticks.now += 60
    # The API server itself remembers tokens for some seconds: what matters is that it is asked again.
    await_refusal(workloads, token, ticks)


def test_expired(workloads: Workloads, apiserver: ApiServer, job: str) -> None:
    """A token that is over is refused, although signed by the cluster; its twin that is not over is good."""
    token, now = apiserver.token("acme-jobs", job, [AUDIENCE]), int(time.time())
    assert workloads.authenticate(apiserver.forge(token, exp=now + 500))
    refused(workloads, apiserver.forge(token, exp=now - 60, iat=now - 700, nbf=now - 700))


def test_forged(workloads: Workloads, apiserver: ApiServer, job: str) -> None:
    """A token that nobody signed is refused by the API server."""
    header, claims, signature = apiserver.token("acme-jobs", job, [AUDIENCE]).split(".")
    other = apiserver.token("elsewhere", apiserver.account("elsewhere"), [AUDIENCE]).split(".")[2]
    refused(workloads, f"{header}.{claims}.{other}")
    assert workloads.authenticate(f"{header}.{claims}.{signature}")


def test_review_is_remembered(
    reviewing: Callable[..., Workloads], apiserver: ApiServer, own_token: Path, tmp_path: Path, job: str
) -> None:
    """Within the cache's time nobody is asked again, and only the very same token is remembered."""
    file = tmp_path / "token"
    file.write_bytes(own_token.read_bytes())
    workloads, token = reviewing(token_file=file), apiserver.token("acme-jobs", job, [AUDIENCE])
    caller = workloads.authenticate(token)
    file.unlink()
    assert workloads.authenticate(token) == caller
    unavailable(workloads, apiserver.token("acme-jobs", job, [AUDIENCE]))


def test_memory_ends_with_the_token(
    reviewing: Callable[..., Workloads],
    apiserver: ApiServer,
    own_token: Path,
    tmp_path: Path,
    job: str,
    ticks: Ticks,
) -> None:
    """A token that ends before the cache's time is not remembered past its end."""
    file, end = tmp_path / "token", int(time.time()) + 300
    file.write_bytes(own_token.read_bytes())
    workloads = reviewing(token_file=file, now=lambda: end - 8.0, cache_s=60)
    token = apiserver.forge(apiserver.token("acme-jobs", job, [AUDIENCE]), exp=end)
    caller = workloads.authenticate(token)
    file.unlink()
    ticks.now += 7
    assert workloads.authenticate(token) == caller
    ticks.now += 1
    unavailable(workloads, token)


def test_own_token_is_read_anew(
    reviewing: Callable[..., Workloads], apiserver: ApiServer, own_token: Path, tmp_path: Path, job: str
) -> None:
    """The kubelet replaces our token: the next review uses the new one."""
    file = tmp_path / "token"
    file.write_text("outdated")
    workloads, token = reviewing(token_file=file), apiserver.token("acme-jobs", job, [AUDIENCE])
    unavailable(workloads, token)
    file.write_bytes(own_token.read_bytes())
    assert workloads.authenticate(token)


def test_not_allowed_to_review(
    reviewing: Callable[..., Workloads],
    apiserver: ApiServer,
    tmp_path: Path,
    job: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the role for reviews the log and the check at the start name the remedy; callers get 503."""
    file = tmp_path / "token"
    file.write_text(apiserver.token("keysvc", apiserver.account("keysvc")))
    workloads = reviewing(token_file=file)
    with caplog.at_level("DEBUG"):
        unavailable(workloads, apiserver.token("acme-jobs", job, [AUDIENCE]))
    assert "system:auth-delegator" in caplog.text
    with pytest.raises(errors.SetupError, match="system:auth-delegator"):
        workloads.check()


def test_own_token_refused(reviewing: Callable[..., Workloads], tmp_path: Path) -> None:
    """A token of ours that the API server refuses is found at the start."""
    file = tmp_path / "token"
    file.write_text("outdated")
    with pytest.raises(errors.SetupError, match="own token"):
        reviewing(token_file=file).check()


def test_check(workloads: Workloads) -> None:
    """A cluster that lets us review tokens passes the check."""
    workloads.check()


def test_nothing_listens(reviewing: Callable[..., Workloads], apiserver: ApiServer, job: str) -> None:
    """An API server that is down is 503, not 401, and the check says where nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"https://127.0.0.1:{taken.getsockname()[1]}"
    workloads = reviewing(api_server=url)
    unavailable(workloads, apiserver.token("acme-jobs", job, [AUDIENCE]))
    with pytest.raises(errors.SetupError, match=url):
        workloads.check()


def test_foreign_certificate(
    reviewing: Callable[..., Workloads], apiserver: ApiServer, job: str, tmp_path: Path
) -> None:
    """A server that our authority does not vouch for gets no token to see: 503."""
    write_certificates(tmp_path)
    workloads = reviewing(ca_file=tmp_path / "ca.crt")
    unavailable(workloads, apiserver.token("acme-jobs", job, [AUDIENCE]))


def test_hanging(reviewing: Callable[..., Workloads], apiserver: ApiServer, job: str) -> None:
    """An API server that hangs holds nobody beyond the deadline, and works again afterwards."""
    workloads, token = reviewing(), apiserver.token("acme-jobs", job, [AUDIENCE])
    os.kill(apiserver.program.pid, signal.SIGSTOP)
    try:
        with deadline.within(0.3):
            unavailable(workloads, token)
    finally:
        os.kill(apiserver.program.pid, signal.SIGCONT)
    assert workloads.authenticate(token)


def test_crowd(reviewing: Callable[..., Workloads], apiserver: ApiServer, job: str) -> None:
    """More callers than places: all that the deadline allows are answered, with one place too."""
    workloads = reviewing(concurrency=1)
    tokens = [apiserver.token("acme-jobs", job, [AUDIENCE]) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert {caller.tenant for caller in pool.map(workloads.authenticate, tokens)} == {"acme"}


def test_made_up_tokens_reach_nobody(reviewing: Callable[..., Workloads], apiserver: ApiServer) -> None:
    """A token that names no bound account is refused without a call, even with the API server down."""
    workloads = reviewing(api_server="https://127.0.0.1:1")
    token = apiserver.token("elsewhere", apiserver.account("elsewhere"), [AUDIENCE])
    for subject in ("alice", "system:serviceaccount:acme-jobs", "system:serviceaccount:acme-jobs:*", 7, None):
        refused(workloads, apiserver.forge(token, sub=subject))
    unavailable(workloads, apiserver.forge(token, sub="system:serviceaccount:acme-jobs:x"))


@contextmanager
def answering(status: int, body: object = None) -> Iterator[tuple[str, list[str]]]:
    """The URL of a server that is no API server of ours, and the paths that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_redirects_are_not_followed(
    reviewing: Callable[..., Workloads], apiserver: ApiServer, job: str
) -> None:
    """A redirect would carry both tokens elsewhere: it is an error."""
    with answering(307) as (url, asked):
        unavailable(reviewing(api_server=url), apiserver.token("acme-jobs", job, [AUDIENCE]))
    assert asked == ["/apis/authentication.k8s.io/v1/tokenreviews"]


@pytest.mark.parametrize(
    ("changed", "accepted"),
    [
        ({}, True),
        ({"audiences": None}, False),
        ({"audiences": ["another"]}, False),
        ({"authenticated": False}, False),
        ({"authenticated": None}, False),
        ({"user": None}, False),
        ({"user": {"username": "system:serviceaccount:elsewhere:job"}}, False),
        ({"user": {"username": "admin"}}, False),
    ],
)
def test_doubtful_reviews(
    reviewing: Callable[..., Workloads],
    apiserver: ApiServer,
    job: str,
    changed: dict[str, Any],
    accepted: bool,
) -> None:
    """A review without our audience, as from an old API server, or without a bound account, is no yes."""
    good = {"authenticated": True, "audiences": [AUDIENCE]}
    status = {**good, "user": {"username": f"system:serviceaccount:acme-jobs:{job}"}, **changed}
    token = apiserver.token("acme-jobs", job, [AUDIENCE])
    with answering(201, {"spec": {"token": ""}, "status": status}) as (url, _asked):
        workloads = reviewing(api_server=url)
        if accepted:
            assert workloads.authenticate(token).tenant == "acme"
        else:
            refused(workloads, token)


@pytest.mark.parametrize("body", ["nonsense", [], {"status": 7}, {"spec": None}, None])
def test_nonsense_for_a_review(
    reviewing: Callable[..., Workloads], apiserver: ApiServer, job: str, body: object
) -> None:
    """What is no review, as from a proxy in between, accepts nobody: 401 or 503, never a crash."""
    with answering(201, body) as (url, _asked):
        workloads = reviewing(api_server=url)
        with pytest.raises((errors.Unavailable, errors.Unauthenticated)):
            workloads.authenticate(apiserver.token("acme-jobs", job, [AUDIENCE]))


def test_no_token_in_the_log(
    workloads: Workloads, apiserver: ApiServer, own_token: Path, job: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At the loudest level the log holds neither a caller's token nor our own."""
    token = apiserver.token("acme-jobs", job, [AUDIENCE])
    with caplog.at_level("DEBUG"):
        workloads.authenticate(token)
        refused(workloads, token[:-40] + "A" * 40)
        refused(workloads, apiserver.forge(token, sub="alice"))
    assert "bound to no tenant" in caplog.text
    assert token not in caplog.text
    assert own_token.read_text().strip() not in caplog.text


def test_through_identity(workloads: Workloads, apiserver: ApiServer, job: str) -> None:
    """A header with a service account's token finds its way by the cluster's issuer."""

    def never(_secret: str) -> Caller:
        raise AssertionError

    token = apiserver.token("acme-jobs", job, [AUDIENCE])
    identity = Identity((), workloads)
    identity.check()
    assert identity.authenticate(never, f"Bearer {token}").tenant == "acme"
    with pytest.raises(errors.Unauthenticated):
        identity.authenticate(never, f"Bearer {apiserver.forge(token, iss='https://elsewhere.example')}")
