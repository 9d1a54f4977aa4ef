"""The checkpoint job: what is signed, exported once, and what stops it; after kills and without network."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import fsspec
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlmodel import Session, col, select

from anamorph.errors import AuditRefused, SetupError, Unavailable
from anamorph.wire.admin import AuditRead
from anamorph.wire.audit import Checkpoint
from anamorph.wire.checkpoints import SignedCheckpoint, decode, object_name, verify_log
from anamorph_keysvc import audit, checkpoints
from anamorph_keysvc.checkpoints import LocalSigner, Outcome, checkpoint_all, export
from anamorph_keysvc.columns import Base
from anamorph_keysvc.scope import WORKER, ScopedSession, tenant_scope
from anamorph_keysvc.tables import Audit, AuditCheckpoint, Tenant

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
INTERVAL = timedelta(minutes=1)
SEED = bytes(range(32))


@dataclass
class Signer:
    """A real key behind a switch, that knows whether a transaction is open while it signs."""

    open_transactions: Callable[[], int]
    reachable: bool = True
    local: LocalSigner = field(default_factory=lambda: LocalSigner(SEED))

    def sign(self, message: bytes) -> tuple[int, bytes]:
        assert self.open_transactions() == 0
        if not self.reachable:
            raise Unavailable("the key-management service is sealed")
        return self.local.sign(message)

    def public_keys(self) -> dict[int, bytes]:
        return self.local.public_keys()


class Chains:
    """Audit chains in a database, the job, and where it exports to."""

    def __init__(self, engine: Engine, destination: str) -> None:
        self.engine = engine
        self.destination = destination
        self.now = NOON
        self.opened = 0
        self.signer = Signer(lambda: self.opened)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        with (
            self.engine.connect() as connection,
            ScopedSession(connection, WORKER) as session,
            session.begin(),
        ):
            self.opened += 1
            try:
                yield session
            finally:
                self.opened -= 1

    def tenant(self, tenant: str) -> None:
        with self.transaction() as session:
            session.add(Tenant(id=tenant, display_name="", kek=f"kek-{tenant}", created_at=NOON))

    def append(self, count: int = 1, tenant: str = "acme", actor: str = "ann") -> None:
        with self.transaction() as session:
            for number in range(count):
                audit.append(
                    session,
                    tenant=tenant,
                    at=self.now,
                    actor=actor,
                    action="rotate",
                    subject="chat",
                    detail={"n": number},
                )

    def run(self, *, later: timedelta = INTERVAL) -> Outcome:
        self.now += later
        sessions: Callable[[], AbstractContextManager[Session]] = self.transaction
        return checkpoint_all(
            sessions, sessions, self.signer, self.destination, lambda: self.now, interval=INTERVAL
        )

    def rows(self, tenant: str = "acme") -> list[AuditRead]:
        with self.transaction() as session:
            found = select(Audit).where(Audit.tenant == tenant).order_by(col(Audit.sequence))
            return [audit.read(row) for row in session.exec(found)]

    def tamper(self, statement: str) -> None:
        with self.transaction() as session:
            session.connection().execute(text(statement))

    def stored(self) -> list[AuditCheckpoint]:
        with self.transaction() as session:
            return list(session.exec(select(AuditCheckpoint).order_by(col(AuditCheckpoint.sequence))))

    def exported(self, tenant: str = "acme") -> list[SignedCheckpoint]:
        files = sorted(Path(self.destination, tenant).glob("*.json"))
        return [decode(path.read_bytes()) for path in files]


@pytest.fixture
def chains(tmp_path: Path) -> Iterator[Chains]:
    engine = create_engine(f"sqlite:///{tmp_path / 'audit.db'}")
    Base.metadata.create_all(engine)
    made = Chains(engine, str(tmp_path / "out"))
    made.tenant("acme")
    yield made
    engine.dispose()


def checkpoint(digest: str = "a" * 64, *, at: datetime = NOON) -> SignedCheckpoint:
    return checkpoints.sign(LocalSigner(SEED), "acme", Checkpoint(3, digest), at)


def test_what_the_job_exports_covers_the_whole_log(chains: Chains) -> None:
    """Heads are signed and exported, and verification with the public keys finds nothing uncovered."""
    chains.append(3)
    assert chains.run() == Outcome(signed=1, exported=1)
    chains.append(2)
    assert chains.run() == Outcome(signed=1, exported=1)
    verdict = verify_log(chains.rows(), chains.exported(), chains.signer.public_keys(), "acme")
    assert verdict.intact
    assert (verdict.covered, verdict.uncovered) == (5, 0)
    assert [one.sequence for one in chains.exported()] == [3, 5]


def test_a_log_that_has_not_grown_is_not_signed_again(chains: Chains) -> None:
    """No rows, or no new rows: no checkpoint, no object."""
    assert chains.run() == Outcome()
    chains.append()
    chains.run()
    assert chains.run() == Outcome()
    assert len(chains.exported()) == 1


def test_a_chain_gets_one_checkpoint_per_interval(chains: Chains) -> None:
    """Rows that come soon after a checkpoint wait for the next; a new chain does not wait."""
    chains.append()
    chains.run()
    chains.append()
    chains.tenant("globex")
    chains.append(tenant="globex")
    assert chains.run(later=INTERVAL / 2).signed == 1
    assert [one.sequence for one in chains.exported("globex")] == [1]
    assert chains.run(later=INTERVAL / 2).signed == 1
    assert [one.sequence for one in chains.exported()] == [1, 2]


def test_those_that_have_waited_longest_come_first(chains: Chains) -> None:
    """With more chains than one run takes, none starves."""
    for minute, tenant in ((2, "b"), (1, "c"), (0, "d")):
        chains.tenant(tenant)
        chains.append(tenant=tenant)
        if minute:
            head = Checkpoint(1, chains.rows(tenant)[0].digest)
            with chains.transaction() as session:
                at = NOON + minute * INTERVAL
                checkpoints.record(session, checkpoints.sign(LocalSigner(SEED), tenant, head, at))
            chains.append(tenant=tenant)
    with chains.transaction() as session:
        order = checkpoints.due(session, NOON + 9 * INTERVAL, interval=INTERVAL)
        first = checkpoints.due(session, NOON + 9 * INTERVAL, interval=INTERVAL, limit=1)
    assert [one.tenant for one in order] == ["d", "c", "b"]
    assert [one.tenant for one in first] == ["d"]


@pytest.mark.parametrize(
    "statement",
    ["UPDATE audit SET actor = 'mallory' WHERE sequence = 5", "DELETE FROM audit WHERE sequence = 5"],
    ids=["edited", "deleted"],
)
def test_a_damaged_chain_is_never_signed(chains: Chains, statement: str) -> None:
    """A row that does not hold raises an alarm, run after run, and other chains are still signed."""
    chains.append(3)
    chains.run()
    chains.append(3)
    chains.tenant("globex")
    chains.append(tenant="globex")
    chains.tamper(statement)
    found = chains.run()
    assert "the audit log of acme breaks at row 5" in found.alarms[0]
    assert found.signed == found.exported == 1
    assert len(chains.run().alarms) == 1
    assert [one.sequence for one in chains.exported()] == [3]


@pytest.mark.parametrize("first", [1, 3])
def test_rows_cut_off_behind_a_checkpoint_raise_an_alarm(chains: Chains, first: int) -> None:
    """A chain that is shorter than its last checkpoint is seen without reading the export."""
    chains.append(3)
    chains.run()
    chains.tamper(f"DELETE FROM audit WHERE sequence >= {first}")
    found = chains.run()
    assert found.signed == 0
    assert f"breaks at row {first}: missing" in found.alarms[0]


def test_a_chain_that_forks_from_what_was_exported_raises_an_alarm(chains: Chains) -> None:
    """A database from a backup, or rewritten with its own checkpoints, contradicts the export."""
    chains.append(2)
    chains.run()
    before = Path(chains.destination, object_name("acme", 2)).read_bytes()
    chains.tamper("DELETE FROM audit")
    chains.tamper("DELETE FROM audit_checkpoint")
    chains.append(2, actor="mallory")
    found = chains.run()
    assert found.exported == 0
    assert "row 2 of acme was exported before with another content" in found.alarms[0]
    assert Path(chains.destination, object_name("acme", 2)).read_bytes() == before


def test_a_sealed_signer_leaves_the_work_for_later(chains: Chains) -> None:
    """Nothing is stored without a signature, and the next run catches up."""
    chains.append(2)
    chains.signer.reachable = False
    assert chains.run() == Outcome(unavailable="the key-management service is sealed")
    assert chains.stored() == []
    chains.signer.reachable = True
    assert chains.run() == Outcome(signed=1, exported=1)


def test_a_kill_before_the_export_is_made_up_for(chains: Chains, tmp_path: Path) -> None:
    """A checkpoint that was stored only, or exported and not marked, is exported once in the end."""
    chains.append(2)
    blocked = tmp_path / "out"
    blocked.write_text("a file where the folder should be")
    failed = chains.run()
    assert failed.signed == 1
    assert "cannot be exported (NotADirectoryError)" in (failed.unavailable or "")
    blocked.unlink()
    assert chains.run() == Outcome(exported=1)
    chains.tamper("UPDATE audit_checkpoint SET exported_at = NULL")
    assert chains.run() == Outcome(exported=1)
    assert len(chains.exported()) == 1


def test_of_two_processes_one_records(chains: Chains) -> None:
    """The same head signed twice is stored once, with the first signature."""
    chains.append()
    with chains.transaction() as session:
        [grown] = checkpoints.due(session, NOON, interval=INTERVAL)
    one, other = (
        checkpoints.sign(chains.signer, "acme", grown.head, NOON + timedelta(seconds=s)) for s in (0, 1)
    )
    with chains.transaction() as session:
        assert checkpoints.record(session, one)
        assert not checkpoints.record(session, other)
        assert checkpoints.unexported(session) == [one]


def test_the_worker_checkpoints_what_the_service_writes(world: Any, tmp_path: Path) -> None:
    """On both databases, with the rights that the worker has there: all tenants' logs are covered."""
    for tenant in ("acme", "globex"):
        world.model(tenant)
    database, signer = world.service.database, LocalSigner(SEED)
    done = checkpoint_all(
        lambda: database.read(WORKER),
        lambda: database.write(WORKER),
        signer,
        str(tmp_path / "out"),
        world.clock,
        interval=INTERVAL,
    )
    assert done == Outcome(signed=2, exported=2)
    for tenant in ("acme", "globex"):
        with database.read(tenant_scope(tenant)) as session:
            rows = [audit.read(row) for row in session.exec(select(Audit).order_by(col(Audit.sequence)))]
        exported = [decode(path.read_bytes()) for path in (tmp_path / "out" / tenant).iterdir()]
        verdict = verify_log(rows, exported, signer.public_keys(), tenant)
        assert verdict.intact
        assert verdict.covered == len(rows) > 0


def test_an_object_is_never_overwritten(tmp_path: Path) -> None:
    """The same row again is fine and changes nothing; another row's digest in its place is refused."""
    place = tmp_path / object_name("acme", 3)
    assert export(str(tmp_path), checkpoint())
    before = place.read_bytes()
    assert not export(str(tmp_path), checkpoint())
    assert not export(str(tmp_path), checkpoint(at=NOON + INTERVAL))
    with pytest.raises(AuditRefused, match="exported before"):
        export(str(tmp_path), checkpoint("b" * 64))
    assert place.read_bytes() == before
    assert stat.S_IMODE(place.stat().st_mode) & 0o222 == 0
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_damaged_object_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Something else under the name of a checkpoint is an alarm, not a success."""
    place = tmp_path / object_name("acme", 3)
    place.parent.mkdir()
    place.write_bytes(b"{}")
    with pytest.raises(AuditRefused):
        export(str(tmp_path), checkpoint())


def test_of_many_exporters_at_once_one_writes(tmp_path: Path) -> None:
    """The file system decides, and every other exporter finds the same row there."""
    wrote: list[bool] = []
    start = Barrier(8)

    def work(number: int) -> None:
        start.wait()
        wrote.append(export(str(tmp_path), checkpoint(at=NOON + timedelta(seconds=number))))

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wrote) == [False] * 7 + [True]
    assert len(list((tmp_path / "acme").iterdir())) == 1


def test_an_object_store_is_written_once_too() -> None:
    """Through fsspec: one object, never overwritten."""
    root = f"memory://checkpoints-{os.urandom(4).hex()}"
    assert export(root, checkpoint())
    assert not export(root, checkpoint())
    with pytest.raises(AuditRefused):
        export(root, checkpoint("b" * 64))
    filesystem, path = fsspec.core.url_to_fs(root)
    assert decode(filesystem.cat_file(f"{path}/{object_name('acme', 3)}")) == checkpoint()


@pytest.mark.parametrize("url", ["s3://key:secret-word@bucket/x", "nonsense://x", "simplecache::s3://x"])
def test_a_strange_destination_is_refused_without_repeating_it(url: str) -> None:
    """Credentials in a URL reach no log."""
    with pytest.raises(SetupError) as found:
        export(url, checkpoint())
    assert "secret-word" not in str(found.value)


def test_a_local_key_is_drawn_once_and_private(tmp_path: Path) -> None:
    """The file is 0600, opened again it signs the same, and open to others it is refused."""
    path = tmp_path / "checkpoint.key"
    first = LocalSigner.open(path, os.urandom)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert LocalSigner.open(path, os.urandom).public_keys() == first.public_keys()
    assert path.read_bytes().hex() not in repr(first)
    path.chmod(0o640)
    with pytest.raises(SetupError, match="chmod 600"):
        LocalSigner.open(path, os.urandom)


def test_a_damaged_local_key_is_refused(tmp_path: Path) -> None:
    """A key that is too short is not filled up, and not replaced."""
    path = tmp_path / "checkpoint.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(SetupError, match="damaged"):
        LocalSigner.open(path, os.urandom)
