"""PostgreSQL restarted, slow or cut off: what was acknowledged is there, and nothing is half done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from tests.keysvc.faults import invariants
from tests.keysvc.faults.calls import Outcome, ask, at_once, slowest, until
from tests.keysvc.faults.site import MODEL, Owner

from anamorph.wire.states import State

if TYPE_CHECKING:
    from tests.keysvc.faults.outage import Record
    from tests.keysvc.faults.site import Site
    from tests.servers.production import KeyServiceProcess

pytestmark = [pytest.mark.real, pytest.mark.slow]
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"

FAULTS: dict[str, Callable[[Site], None]] = {
    "latency": lambda site: site.database.latency(2000),
    "resets": lambda site: site.database.reset_peer(),
    "answers-lost": lambda site: site.database.reset_peer("downstream"),
    "half-open": lambda site: site.database.hang(),
    "silent": lambda site: site.database.hang("downstream"),
    "refused": lambda site: site.database.cut(),
}


def rotate(owner: Owner, process: KeyServiceProcess, key: str) -> Outcome:
    return ask(process, "POST", f"{owner.keys_path}:rotate", owner.admin, key=key)


def listed(owner: Owner, process: KeyServiceProcess) -> Outcome:
    return ask(process, "GET", owner.keys_path, owner.admin)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_of_the_database_is_endured(
    site: Site, owner: Owner, fault: str, record_property: Record
) -> None:
    """Everything ends in time, in success or a problem; then the pools recover by themselves."""
    version = owner.active()
    begin_token = f"/v1/tenants/{owner.tenant}/models/{MODEL}/inference-tokens"
    FAULTS[fault](site)
    ended = at_once(
        {
            "rotate": lambda: rotate(owner, site.first, "once"),
            "list": lambda: listed(owner, site.first),
            "release": lambda: owner.release(site.second, version),
            "token": lambda: ask(site.second, "POST", begin_token, owner.client),
            "ready": lambda: ask(site.first, "GET", "/readyz"),
            "live": lambda: ask(site.first, "GET", "/livez"),
        }
    )
    site.database.heal()
    record_property("slowest_call_s", slowest(ended.values(), ended["live"]))
    assert ended["live"].status == 200
    assert all(outcome.as_promised for outcome in ended.values()), ended
    took = [until(lambda: listed(owner, process).status == 200) for process in site.processes.values()]  # noqa: B023
    record_property("answers_again_after_s", round(max(took), 1))
    # Whether or not the first attempt was done: the same request under the same key is done once.
    again = rotate(owner, site.first, "once")
    assert (again.status, again.body["version"]) == (202, version + 1)
    with owner.keys() as keys:
        until(lambda: keys.get_version(*owner.at, version + 1).key_id is not None)
    assert len(listed(owner, site.first).body["items"]) == version + 1


@contextmanager
def nobody_writes_audit_rows(site: Site) -> Iterator[None]:
    """The last statement of every change waits, for as long as the server lives."""
    with (
        suppress(psycopg.OperationalError),
        site.postgres.admin(site.production.database) as connection,
        connection.transaction(),
    ):
        connection.execute("LOCK TABLE audit IN EXCLUSIVE MODE")
        yield


def someone_waits(site: Site) -> bool:
    with site.postgres.admin() as connection:
        row = connection.execute(WAITING, [site.production.database]).fetchone()
    return row is not None and row[0] > 0


def test_a_restart_in_mid_transaction_leaves_no_trace(site: Site, owner: Owner) -> None:
    """Version and operation were written, the audit row was not: after a crash there is none of them."""
    ended: list[Outcome] = []
    caller = threading.Thread(target=lambda: ended.append(rotate(owner, site.first, "once")))
    with nobody_writes_audit_rows(site):
        caller.start()
        until(lambda: someone_waits(site))
        site.postgres.restart("immediate")
    caller.join()
    assert [outcome.status for outcome in ended] == [503]
    assert ended[0].as_promised
    assert not [at for at in invariants.check(site.production) if at[0] == owner.tenant]
    assert rotate(owner, site.first, "once").body["version"] == 1


@dataclass
class Writer:
    """Begins and cancels rotations without a pause; every request is repeated until it is acknowledged."""

    owner: Owner
    process: KeyServiceProcess
    stop: threading.Event
    outcomes: list[Outcome] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def run(self) -> None:
        while not self.stop.is_set():
            number = len(self.begun)
            operation = self.insist(f"{self.owner.keys_path}:rotate", f"rotate-{number}")
            self.begun.append(operation["version"])
            path = f"/v1/tenants/{self.owner.tenant}/operations/{operation['id']}:cancel"
            self.insist(path, f"cancel-{number}")
            self.cancelled.append(operation["version"])

    def insist(self, path: str, key: str) -> dict[str, Any]:
        while True:
            outcome = ask(self.process, "POST", path, self.owner.admin, key=key)
            self.outcomes.append(outcome)
            if outcome.status < 300:
                return outcome.body
            assert outcome.as_promised, outcome


def test_restarts_under_load_lose_nothing(site: Site, record_property: Record) -> None:
    """Three crashes among writers: each acknowledged change is there, each request done once."""
    stop = threading.Event()
    writers = [
        Writer(site.owner(), process, stop)
        for process, _ in zip(cycle(site.processes.values()), range(6), strict=False)
    ]
    threads = [threading.Thread(target=writer.run) for writer in writers]
    for thread in threads:
        thread.start()
    for _ in range(3):
        enough = [len(writer.cancelled) + 3 for writer in writers]
        until(lambda: all(len(w.cancelled) >= n for w, n in zip(writers, enough, strict=True)), 60)  # noqa: B023
        site.postgres.restart("immediate")
    stop.set()
    for thread in threads:
        thread.join()
    outcomes = [outcome for writer in writers for outcome in writer.outcomes]
    record_property("slowest_call_s", slowest(outcomes))
    record_property("acknowledged", sum(outcome.status < 300 for outcome in outcomes))
    record_property("refused_for_now", sum(outcome.status == 503 for outcome in outcomes))
    versions = invariants.check(site.production)
    for writer in writers:
        mine = {at[2]: row.state for at, row in versions.items() if at[0] == writer.owner.tenant}
        assert writer.begun == writer.cancelled == list(range(1, len(mine) + 1))
        assert set(mine.values()) == {State.FAILED}
