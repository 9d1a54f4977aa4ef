"""Limits per tenant and kind of route, and per address where credentials fail."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.credentials import Caller, GrantHolder
from anamorph_keysvc.ratelimit import Buckets, Kind, RateLimits, kind_of
from anamorph_keysvc.settings import Limits

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

ACME = Caller("key:1", Role.CLIENT, "acme")
GLOBEX = Caller("key:2", Role.CLIENT, "globex")
OPERATOR = Caller("key:3", Role.PLATFORM)
JOB = Caller("grant:1", None, "acme", GrantHolder("1", "acme", "chat", 1))
FEW = Limits(
    reads_per_minute=4,
    writes_per_minute=3,
    releases_per_minute=2,
    rotations_per_minute=1,
    failed_logins_per_minute=3,
)


@dataclass
class Seconds:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def limits(clock: Seconds) -> RateLimits:
    return RateLimits(FEW, clock=clock)


def admitted(limits: RateLimits, caller: Caller, kind: Kind, tries: int = 10) -> int:
    """How many of so many requests at once get through."""
    count = 0
    for _ in range(tries):
        try:
            limits.check(caller, kind)
        except errors.TooManyRequests:
            continue
        count += 1
    return count


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/tenants/acme/models/chat/keys", Kind.READ),
        ("HEAD", "/v1/tenants/acme", Kind.READ),
        ("POST", "/v1/tenants/acme/models", Kind.WRITE),
        ("PATCH", "/v1/tenants/acme/models/chat/rotation-policy", Kind.WRITE),
        ("DELETE", "/v1/tenants/acme/api-keys/1", Kind.WRITE),
        ("POST", "/v1/tenants/acme/models/chat/keys/1:suspend", Kind.WRITE),
        ("POST", "/v1/tenants/acme/models/chat/keys/1:release", Kind.RELEASE),
        ("POST", "/v1/tenants/acme/models/chat/inference-tokens", Kind.RELEASE),
        ("POST", "/v1/tenants/acme/models/chat/keys:rotate", Kind.ROTATE),
    ],
)
def test_every_request_has_a_kind(method: str, path: str, expected: Kind) -> None:
    """By method and path."""
    assert kind_of(method, path) is expected


def test_each_kind_has_a_limit_of_its_own(limits: RateLimits) -> None:
    """Reading much does not keep a tenant from writing."""
    counts = [admitted(limits, ACME, kind) for kind in (Kind.READ, Kind.WRITE, Kind.RELEASE, Kind.ROTATE)]
    assert counts == [4, 3, 2, 1]


def test_tenants_do_not_share(limits: RateLimits) -> None:
    """What one tenant has used up, another still has; its keys are counted together."""
    assert admitted(limits, ACME, Kind.READ) == 4
    assert admitted(limits, Caller("key:9", Role.ADMIN, "acme"), Kind.READ) == 0
    assert admitted(limits, GLOBEX, Kind.READ) == 4


def test_the_platform_is_not_limited_and_a_job_not_by_its_tenant(limits: RateLimits) -> None:
    """The operator works for all tenants; a job must not wait for the tenant's clients."""
    assert admitted(limits, OPERATOR, Kind.ROTATE, tries=50) == 50
    admitted(limits, ACME, Kind.RELEASE)
    assert admitted(limits, JOB, Kind.RELEASE) == 2


def test_tokens_come_back_when_the_refusal_says(limits: RateLimits, clock: Seconds) -> None:
    """Not before, not later; and never more at once than the limit."""
    admitted(limits, ACME, Kind.READ)
    with pytest.raises(errors.TooManyRequests) as caught:
        limits.check(ACME, Kind.READ)
    assert (caught.value.code, caught.value.retry_after) == ("rate_limited", 15)
    clock.now += 14
    assert admitted(limits, ACME, Kind.READ) == 0
    clock.now += 1
    assert admitted(limits, ACME, Kind.READ) == 1
    clock.now += 3600
    assert admitted(limits, ACME, Kind.READ) == 4


def test_after_a_burst_the_rate_holds(clock: Seconds) -> None:
    """The limit at once, and from then on what comes back in a minute."""
    buckets, taken = Buckets(60, clock=clock), [0, 0, 0]
    for tenth in range(1800):
        taken[tenth // 600] += buckets.take("acme") == 0
        clock.now += 0.1
    assert taken[0] in {119, 120}
    assert taken[1:] == [60, 60]


def test_many_threads_get_exactly_the_limit() -> None:
    """No update is lost between threads."""
    buckets = Buckets(500, clock=Seconds())
    start = threading.Barrier(8)

    def work(_: int) -> int:
        start.wait()
        return sum(buckets.take("acme") == 0 for _ in range(500))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 500


def test_keys_of_strangers_do_not_fill_the_memory(clock: Seconds) -> None:
    """The key used longest ago is forgotten."""
    buckets = Buckets(1, most_keys=100, clock=clock)
    for number in range(10_000):
        buckets.take(str(number))
    assert len(buckets) == 100
    assert buckets.take("9999") > 0
    assert buckets.take("0") == 0


def refuse(limits: RateLimits, address: str | None, authorization: str) -> type[Exception]:
    """What comes of a wrong credential."""
    with pytest.raises(errors.ServiceError) as caught, limits.attempt(address, authorization):
        raise errors.Unauthenticated("no")
    return type(caught.value)


def accept(limits: RateLimits, address: str | None, authorization: str) -> None:
    with limits.attempt(address, authorization):
        pass


def test_guessing_ends_before_anything_is_looked_up(limits: RateLimits, clock: Seconds) -> None:
    """After so many failures the block is not run any more, until the minute has passed."""
    outcomes = [refuse(limits, "192.0.2.1", f"Bearer {guess}") for guess in range(5)]
    assert outcomes == [errors.Unauthenticated] * 3 + [errors.TooManyRequests] * 2
    with pytest.raises(errors.TooManyRequests) as caught:
        accept(limits, "192.0.2.1", "Bearer right")
    assert caught.value.retry_after == 20
    accept(limits, "192.0.2.2", "Bearer right")
    clock.now += 20
    accept(limits, "192.0.2.1", "Bearer other")


def test_a_guesser_does_not_shut_its_neighbours_out(limits: RateLimits) -> None:
    """Behind one proxy: a credential that was accepted before still gets through, until it fails."""
    accept(limits, "192.0.2.1", "Bearer right")
    for guess in range(5):
        refuse(limits, "192.0.2.1", f"Bearer {guess}")
    accept(limits, "192.0.2.1", "Bearer right")
    assert refuse(limits, "192.0.2.1", "Bearer right") is errors.Unauthenticated
    assert refuse(limits, "192.0.2.1", "Bearer right") is errors.TooManyRequests


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        (None, "testclient", True),
    ],
)
def test_an_address_is_what_one_guesser_has(
    limits: RateLimits, first: str | None, second: str, shared: bool
) -> None:
    """A /64 of IPv6 is one; so are clients without an address."""
    for guess in range(3):
        refuse(limits, first, f"Bearer {guess}")
    expected = errors.TooManyRequests if shared else errors.Unauthenticated
    assert refuse(limits, second, "Bearer x") is expected


def test_other_errors_are_not_failures_to_log_in(limits: RateLimits) -> None:
    """A database that is busy says nothing about a credential."""
    for _ in range(9):
        with pytest.raises(errors.Unavailable), limits.attempt("192.0.2.1", "Bearer x"):
            raise errors.Unavailable("busy")
    accept(limits, "192.0.2.1", "Bearer y")


@pytest.fixture
def limited(world: World) -> World:
    """A service with the few requests of ``FEW``."""
    world.model()
    return replace(world, service=replace(world.service, limits=FEW))


async def test_a_request_too_many_is_answered_429(limited: World) -> None:
    """A problem with a Retry-After in whole seconds; other kinds, tenants and the platform go on."""
    limited.model("globex")
    async with limited.http(limited.secret(Role.ADMIN)) as http:
        statuses = [(await http.get("/v1/tenants/acme/models")).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 200, 429]
        refused = await http.get("/v1/tenants/acme/models")
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 15
        assert (await http.post("/v1/tenants/acme/models/chat/keys%3Arotate")).status_code == 202
        assert (await http.post("/v1/tenants/acme/models/chat/keys:rotate")).status_code == 429
    async with limited.http(limited.secret(Role.ADMIN, "globex")) as http:
        assert (await http.get("/v1/tenants/globex/models")).status_code == 200
    async with limited.http(limited.secret(Role.PLATFORM)) as http:
        statuses = [(await http.get("/v1/tenants/acme/models")).status_code for _ in range(9)]
        assert statuses == [200] * 9


async def test_wrong_keys_are_answered_429_after_a_while(limited: World) -> None:
    """Requests without any credential stay 401, and a key that worked before still works."""
    path = "/v1/tenants/acme/models"
    async with limited.http(limited.secret(Role.ADMIN)) as known:
        assert (await known.get(path)).status_code == 200
        async with limited.http("amk_" + "A" * 43) as http:
            statuses = [(await http.get(path)).status_code for _ in range(5)]
        assert statuses == [401, 401, 401, 429, 429]
        assert (await known.get(path)).status_code == 200
    async with limited.http() as http:
        assert [(await http.get(path)).status_code for _ in range(5)] == [401] * 5
