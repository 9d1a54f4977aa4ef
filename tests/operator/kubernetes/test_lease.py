"""Two real processes and one lease on a real API server: never two that write."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client as kubernetes_client
from tests.operator.kubernetes import lease_holder
from tests.operator.kubernetes.conftest import Kubernetes
from tests.servers.kube import running_apiserver
from tests.servers.kubeconfig import write_kubeconfig
from tests.servers.process import Program

from anamorph import errors
from anamorph_operator.kubernetes.api import Client, configuration
from anamorph_operator.kubernetes.catalogue import CONFIG_MAPS, LEASES
from anamorph_operator.kubernetes.lease import Lease, Timing

pytestmark = pytest.mark.real

# Of the lease, as docs/design/kubernetes.md promises it.
TAKEOVER_S = 15


class Replicas:
    """Processes that want the same lease, and the log that whoever has it writes."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.core = kubernetes_client.CoreV1Api(server.admin)
        self.namespace = f"leases-{os.urandom(4).hex()}"
        self.core.create_namespace({"metadata": {"name": self.namespace}})
        self.core.create_namespaced_config_map(
            self.namespace, {"metadata": {"name": "log"}, "data": {"lines": ""}}
        )
        self._folder = folder
        self._kubeconfig = write_kubeconfig(server, folder / "config")
        self.running: dict[str, Program] = {}

    def start(self, name: str) -> Program:
        script = str(Path(lease_holder.__file__))
        command = [sys.executable, script, str(self._kubeconfig), self.namespace, name]
        self.running[name] = Program(command, self._folder / f"{name}.log")
        self.running[name].start(lambda: True)
        return self.running[name]

    def log(self) -> list[str]:
        """Who wrote each line, in the order of the writes."""
        text = self.core.read_namespaced_config_map("log", self.namespace).data["lines"]
        return [line.split()[0] for line in text.splitlines()]

    def turns(self) -> list[str]:
        return [name for name, _ in itertools.groupby(self.log())]

    def await_writes(self, name: str) -> float:
        """Wait until it has written, or written more; seconds that it took."""
        before, began = self.log().count(name), time.monotonic()
        await_true(lambda: self.log().count(name) > before, 60)
        return time.monotonic() - began


def await_true(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def ended(program: Program) -> bool:
    return not program.running


@pytest.fixture
def replicas(kubernetes: Kubernetes, tmp_path: Path) -> Iterator[Replicas]:
    made = Replicas(kubernetes.server, tmp_path)
    yield made
    for program in made.running.values():
        with suppress(ProcessLookupError):
            program.stop(signal.SIGKILL)


def test_a_killed_holder_is_replaced_in_time(replicas: Replicas) -> None:
    holder = replicas.start("a")
    replicas.await_writes("a")
    replicas.start("b")
    replicas.await_writes("a")
    holder.stop(signal.SIGKILL)
    assert replicas.await_writes("b") < TAKEOVER_S
    assert replicas.turns() == ["a", "b"]


def test_a_holder_that_ends_in_order_leaves_at_once(replicas: Replicas) -> None:
    """The other need not wait until the lease has run out: it looks each two seconds."""
    holder = replicas.start("a")
    replicas.await_writes("a")
    replicas.start("b")
    time.sleep(1)
    holder.stop(signal.SIGTERM)
    assert replicas.await_writes("b") < Timing().length_s
    assert replicas.turns() == ["a", "b"]


def test_a_stopped_holder_ends_as_soon_as_it_goes_on(replicas: Replicas) -> None:
    """It was stopped for longer than the lease lasts, anywhere in its work: it writes nothing more."""
    holder = replicas.start("a")
    replicas.await_writes("a")
    replicas.start("b")
    time.sleep(1)
    os.kill(holder.pid, signal.SIGSTOP)
    replicas.await_writes("b")
    os.kill(holder.pid, signal.SIGCONT)
    await_true(lambda: ended(holder), 30)
    replicas.await_writes("b")
    assert replicas.turns() == ["a", "b"]


def test_a_stopped_holder_ends_even_if_nobody_took_over(replicas: Replicas) -> None:
    holder = replicas.start("a")
    replicas.await_writes("a")
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(Timing().length_s)
    written = replicas.log()
    os.kill(holder.pid, signal.SIGCONT)
    await_true(lambda: ended(holder), 30)
    # One that it had sent before it was stopped may still come through.
    assert len(replicas.log()) - len(written) <= 1


def test_a_holder_without_an_api_server_ends(tmp_path: Path) -> None:
    """It cannot know whether somebody else holds the lease by now."""
    with running_apiserver(tmp_path / "server") as server:
        replicas = Replicas(server, tmp_path)
        holder = replicas.start("a")
        replicas.await_writes("a")
        server.program.stop(signal.SIGKILL)
        await_true(lambda: ended(holder), 60)
    assert "this process ends: it could not be renewed in time" in holder.log.read_text()


@pytest.fixture
def admin(kubernetes: Kubernetes, tmp_path: Path) -> Iterator[Client]:
    client = Client(configuration(write_kubeconfig(kubernetes.server, tmp_path / "admin")), timeout_s=2)
    yield client
    client.close()


class Ended(BaseException):
    """In place of the end of the process."""


def end(_status: int) -> None:
    raise Ended


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def lease(admin: Client, namespace: str, who: str, clock: Clock) -> Lease:
    return Lease(admin, namespace, "operator", who, end, now=clock)


def once() -> threading.Event:
    """A stop that comes while the lease is waited for."""
    return OneTry()


class OneTry(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 - no time passes here
        self.set()
        return True


@pytest.mark.parametrize("skew", [timedelta(days=-400), timedelta(0), timedelta(days=400)])
def test_times_that_others_wrote_do_not_matter(
    kubernetes: Kubernetes, admin: Client, skew: timedelta
) -> None:
    """A holder's clock may be anything: the lease lasts from when it was seen."""
    namespace, clock = kubernetes.namespace(), Clock()
    admin.create(held(namespace, datetime.now(UTC) + skew))
    ours = lease(admin, namespace, "b", clock)
    assert not ours.acquire(once())
    clock.now += 9.9
    assert not ours.acquire(once())
    clock.now += 0.2
    assert ours.acquire(once())


def held(namespace: str, renewed: datetime) -> dict[str, Any]:
    spec = {
        "holderIdentity": "a-1",
        "leaseDurationSeconds": 10,
        "renewTime": renewed.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "leaseTransitions": 7,
    }
    metadata = {"namespace": namespace, "name": "operator"}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


def test_whoever_renews_is_waited_for(kubernetes: Kubernetes, admin: Client) -> None:
    namespace, clock = kubernetes.namespace(), Clock()
    renewed = datetime.now(UTC)
    admin.create(held(namespace, renewed))
    ours = lease(admin, namespace, "b", clock)
    for _ in range(5):
        assert not ours.acquire(once())
        clock.now += 9
        renewed += timedelta(seconds=2)
        current = admin.get(LEASES, namespace, "operator")
        admin.update({**held(namespace, renewed), "metadata": current["metadata"]})


def test_a_takeover_is_counted(kubernetes: Kubernetes, admin: Client) -> None:
    namespace, clock = kubernetes.namespace(), Clock()
    admin.create(held(namespace, datetime.now(UTC)))
    ours = lease(admin, namespace, "b", clock)
    ours.acquire(once())
    clock.now += 11
    assert ours.acquire(once())
    spec = admin.get(LEASES, namespace, "operator")["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == (ours.identity, 8)


def test_of_many_that_want_a_free_lease_one_has_it(kubernetes: Kubernetes, admin: Client) -> None:
    namespace = kubernetes.namespace()
    wanting = [lease(admin, namespace, f"r{number}", Clock()) for number in range(8)]
    got: list[Lease] = []
    threads = [
        threading.Thread(target=lambda one=one: got.append(one) if one.acquire(once()) else None)
        for one in wanting
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert admin.get(LEASES, namespace, "operator")["spec"]["holderIdentity"] == got[0].identity


def test_the_fence_closes_before_anybody_else_may_begin(kubernetes: Kubernetes, admin: Client) -> None:
    namespace, clock = kubernetes.namespace(), Clock()
    ours = lease(admin, namespace, "a", clock)
    with pytest.raises(Ended):
        ours.fence()
    assert ours.acquire(once())
    clock.now += 7.9
    ours.fence()
    clock.now += 0.2
    with pytest.raises(Ended):
        ours.fence()
    assert Timing().give_up_s < Timing().length_s


def test_a_given_up_lease_fences_too(kubernetes: Kubernetes, admin: Client) -> None:
    namespace, clock = kubernetes.namespace(), Clock()
    ours = lease(admin, namespace, "a", clock)
    assert ours.acquire(once())
    ours.release()
    with pytest.raises(Ended):
        ours.fence()
    assert lease(admin, namespace, "b", Clock()).acquire(once())


def test_who_may_not_have_leases_is_told_so(kubernetes: Kubernetes, tmp_path: Path) -> None:
    account = kubernetes.server.account("zone-l")
    token = kubernetes.server.token("zone-l", account)
    nobody = Client(configuration(write_kubeconfig(kubernetes.server, tmp_path / "nobody", token)))
    with pytest.raises(errors.Forbidden, match=r"grant the operator the verb 'get' on leases"):
        lease(nobody, "zone-l", "a", Clock()).acquire(once())
    nobody.close()


def test_the_log_is_what_it_is_taken_for(admin: Client, replicas: Replicas) -> None:
    """Positive control: a write that is not fenced would be seen in the log."""
    lease_holder.append(admin, replicas.namespace, "x")
    lease_holder.append(admin, replicas.namespace, "y")
    lease_holder.append(admin, replicas.namespace, "x")
    assert replicas.turns() == ["x", "y", "x"]
    assert admin.get(CONFIG_MAPS, replicas.namespace, "log")["data"]["lines"].count("\n") == 3
