"""The real process, killed at random moments while rotations run: nothing acknowledged is lost."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlmodel import col, select

from anamorph import errors
from anamorph.wire.admin import (
    Activation,
    ApiKeyCreate,
    KeyVersionRead,
    Materialized,
    ModelCreate,
    Probe,
    Role,
    TenantCreate,
)
from anamorph.wire.audit import first_break
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State
from anamorph_keysvc import audit
from anamorph_keysvc.database import Database
from anamorph_keysvc.homes import Home
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.tables import Audit, KeyVersion

KILLS, SEED = 20, 20260711
AT = ("acme", "chat")
ARTIFACT = Materialized(replica="r", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((2,),)))
BROKEN = (errors.Unavailable, errors.Conflict, errors.NotFound)


@dataclass
class Process:
    """The service as users run it; always on the port that it first got."""

    home: Path
    port: int = 0
    child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        port_file = self.home / "port"
        port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "anamorph_keysvc.main", "serve", "--home", str(self.home)]
        log = (self.home.parent / "log").open("ab")
        with log:
            self.child = subprocess.Popen(
                [*command, "--port", str(self.port), "--port-file", str(port_file)], stdout=log, stderr=log
            )
        for _ in range(1200):
            if port_file.exists():
                self.port = int(port_file.read_text())
                return
            assert self.child.poll() is None, "the service did not start"
            time.sleep(0.05)
        raise AssertionError("the service did not start in time")

    def kill(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.wait()

    def terminate(self) -> int:
        assert self.child is not None
        self.child.terminate()
        return self.child.wait(timeout=60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Driver:
    """Rotates over and over, and remembers the highest row version acknowledged for each version."""

    url: str
    token: str
    acknowledged: dict[int, int] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    rotations: int = 0

    def run(self) -> None:
        with KeyService(self.url, self.token) as keys:
            while not self.stop.is_set():
                try:
                    self.round(keys)
                except BROKEN:
                    time.sleep(0.02)

    def round(self, keys: KeyService) -> None:
        """Carry the newest version one rotation further, from wherever a crash has left it."""
        versions = list(everything(keys.list_versions, *AT))
        newest = versions[-1] if versions else None
        if newest is None or newest.state in {State.ACTIVE, State.FAILED}:
            number = keys.rotate(*AT).version
        else:
            number = newest.version
        if newest is None or newest.state is not State.STAGED:
            self.materialize(keys, number)
        self.saw(keys.activate(*AT, number, Activation(endpoint="http://e")))
        self.rotations += 1

    def materialize(self, keys: KeyService, number: int) -> None:
        with KeyService(self.url, keys.materialize(*AT, number).secret) as job:
            job.release(*AT, number, "materialize")
            self.saw(job.stage(*AT, number, ARTIFACT))

    def saw(self, read: KeyVersionRead) -> None:
        self.acknowledged[read.version] = read.row_version


@pytest.fixture
def process(home: Home) -> Process:
    return Process(home.path)


def set_up(process: Process, token: str) -> None:
    with KeyService(process.url, token) as platform:
        platform.create_tenant(TenantCreate(id="acme"))
        secret = platform.create_api_key("acme", ApiKeyCreate(name="a", role=Role.ADMIN)).secret
        model = ModelCreate(id="chat", base="b", vocab_size=9, context_length=9)
        with KeyService(process.url, secret) as admin:
            admin.create_model("acme", model)


def check(home: Home, driver: Driver) -> None:
    """Every invariant, and everything acknowledged, in the database as the dead process left it."""
    acknowledged = dict(driver.acknowledged)
    database = Database.sqlite(home.database)
    with database.read(PLATFORM) as session:
        versions = {row.version: row for row in session.exec(select(KeyVersion))}
        rows = [audit.read(row) for row in session.exec(select(Audit).order_by(col(Audit.sequence)))]
    database.close()
    assert sorted(versions) == list(range(1, len(versions) + 1))
    states = Counter(row.state for row in versions.values())
    assert states[State.ACTIVE] <= 1
    assert states[State.PENDING] + states[State.MATERIALIZING] + states[State.STAGED] <= 1
    assert first_break(rows, tenant="acme") is None
    # Each change of a version has its row: a transition, or the one time that it was given its key.
    written = Counter(row.subject for row in rows if "state" in row.detail or row.action == "prepare")
    assert written == {f"chat/keys/{number}": row.row_version for number, row in versions.items()}
    for number, row_version in acknowledged.items():
        assert versions[number].row_version >= row_version


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(600)
def test_killed_at_any_moment_the_service_comes_back_whole(
    process: Process, home: Home, request: pytest.FixtureRequest
) -> None:
    """kill -9 at 20 seeded moments of running rotations: invariants, chain and acknowledged work survive."""
    moments = random.Random(SEED)  # chosen for repeatability, not for secrecy
    token = home.platform_key.read_text()
    process.start()
    request.addfinalizer(process.kill)
    set_up(process, token)
    driver = Driver(process.url, token)
    thread = threading.Thread(target=driver.run)
    thread.start()
    request.addfinalizer(driver.stop.set)
    for _ in range(KILLS):
        time.sleep(moments.uniform(0.05, 0.8))
        process.kill()
        check(home, driver)
        process.start()
    driver.stop.set()
    thread.join()
    assert driver.rotations > 0
    assert process.terminate() == 0
    check(home, driver)
    with sqlite3.connect(home.database) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    database.close()


@pytest.mark.slow
@pytest.mark.real
def test_sigterm_ends_the_service_after_the_requests_under_way(process: Process, home: Home) -> None:
    """A clean end with exit status 0, and the home free for the next process."""
    process.start()
    with KeyService(process.url) as keys:
        assert keys.inference_keys().keys
    assert process.terminate() == 0
    process.start()
    assert process.terminate() == 0
    log = (home.path.parent / "log").read_text()
    assert home.platform_key.read_text() not in log
