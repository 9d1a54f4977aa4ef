"""A pool behind the door on a real Ray: one process, many tenants, each at his own URL."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from tests.serve.conftest import until
from tests.serve.slots.conftest import KCV, member

from anamorph import errors
from anamorph.serve.engines.fake import continuation
from anamorph.wire import completions as calls
from anamorph.wire.serving import POOL_IMPORT_PATH, pool_name, route_prefix

if TYPE_CHECKING:
    from tests.serve.conftest import Cluster

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

APP = pool_name("small")
PROMPT = [11, 12, 13]
SLOW = "fake:?vocab_size=500&delay_ms=20&swap_ms=20"


class Pooled:
    """A pool on Ray and its members."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def put(self, statuses: dict[str, str]) -> None:
        """Write members and routes, as the operator does: one list."""
        members = [member(name, replica=SLOW, status=status) for name, status in statuses.items()]
        state = {"jwks": self.cluster.jwks, "members": [m.model_dump(mode="json") for m in members]}
        self.cluster.apps[APP] = {
            "name": APP,
            "route_prefix": None,
            "import_path": POOL_IMPORT_PATH,
            "args": {"pool": "small", "engine": "fake", "context_length": 2000, "slots": 2},
            "deployments": [{"name": "pool", "user_config": state}],
        }
        self.cluster.door(
            [
                {"tenant": m.tenant, "version": 1, "key_id": m.key_id, "status": m.status, "app": APP}
                for m in members
            ]
        )
        until("the pool", lambda: self.cluster.state(APP)["status"] == "RUNNING")

    def ask(self, tenant: str, n: int, **fields: Any) -> Any:
        url = self.cluster.ray.serve_url + route_prefix(tenant, "smol", 1)
        request = {"prompt": PROMPT, "max_tokens": n, **fields}
        token, key_id = self.cluster.token(tenant=tenant), f"{tenant}.smol.v1.{KCV}"
        with httpx.Client(timeout=60) as http:
            parts = calls.stream(http, url, request, token=token, key_id=key_id)
            return [token for part in parts for choice in part.choices for token in choice.token_ids]

    def streaming(self, tenant: str) -> bool:
        """Whether an answer has begun."""
        url = self.cluster.ray.serve_url + route_prefix(tenant, "smol", 1) + "/usage"
        token = self.cluster.token(tenant=tenant, sub="operator")
        usage = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30).json()
        return bool(usage["in_flight"])

    def pid(self) -> int:
        ours = set(self.cluster.ray.pids())
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if process.pid in ours and title.startswith("ray::") and f"{APP}:pool" in title:
                return int(process.pid)
        return 0


@pytest.fixture(scope="module")
def pooled(cluster: Cluster) -> Pooled:
    made = Pooled(cluster)
    made.put({f"t{i}": "serving" for i in range(6)})
    return made


def expected(tenant: str, n: int) -> list[int]:
    return continuation(f"{tenant}.smol.v1.{KCV}", PROMPT, n, 500)


def together(*work: Any) -> list[Any]:
    """Run calls side by side; what each returned or raised."""
    found: list[Any] = [None] * len(work)

    def one(index: int) -> None:
        try:
            found[index] = work[index]()
        except errors.AnamorphError as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def all_answer(pooled: Pooled, *tenants: str) -> bool:
    """Whether each gets his own answer, all at once."""
    answers = together(*(partial(pooled.ask, tenant, 20) for tenant in tenants))
    return answers == [expected(tenant, 20) for tenant in tenants]


def test_six_tenants_share_two_slots(pooled: Pooled) -> None:
    """Each at his own URL."""
    assert all_answer(pooled, *(f"t{i}" for i in range(6)))


def test_members_come_and_go_beside_a_stream(pooled: Pooled) -> None:
    """In one process that is not restarted: the neighbour's stream is whole, the revoked one is cut."""
    pid = pooled.pid()

    def change() -> None:
        until("both streams", lambda: pooled.streaming("t0") and pooled.streaming("t1"))
        pooled.put({"t0": "serving", "t1": "gone", "new": "serving"})

    kept, cut, _ = together(lambda: pooled.ask("t0", 400), lambda: pooled.ask("t1", 400), change)
    assert kept == expected("t0", 400)
    assert isinstance(cut, errors.AnamorphError)
    until("the new member", lambda: all_answer(pooled, "new"))
    with pytest.raises(errors.Gone):
        pooled.ask("t1", 5)
    with pytest.raises(errors.NotFound):
        pooled.ask("t2", 5)
    assert pooled.pid() == pid


def test_a_pool_that_dies_comes_back_with_all_members(pooled: Pooled) -> None:
    """Ray starts it again and hands it its members."""
    pooled.put({"t0": "serving", "t1": "serving"})
    os.kill(pooled.pid(), signal.SIGKILL)
    until("answers", lambda: all_answer(pooled, "t0", "t1"))
