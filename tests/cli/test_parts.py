"""A materialisation by several processes, each with a grant of its own from the real key service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64decode
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from tests.cli.test_materialize import Watched

from anamorph.cli.materialize import Order, run
from anamorph.cli.parts import INDEX_VARIABLE
from anamorph.errors import ServiceError
from anamorph.replica import verify
from anamorph.wire.admin import ApiKeyCreate, Role
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State

pytestmark = pytest.mark.real

PARTS = 2
SMALL = 4000  # bytes of a file, so that the tiny model has several
ENVIRONMENT = os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


class Site:
    """A version in MATERIALIZING in two parts, its task, and the credential of its materialiser."""

    def __init__(self, materializing: Any, folder: Path) -> None:
        self.of = materializing
        self.alone = self._alone(folder)
        materializing.keys.materialize(materializing.tenant, "chat", 1, parts=PARTS)
        self.task, self.token = folder / "task.json", folder / "token"
        body = ApiKeyCreate(name="pods", role=Role.MATERIALIZER)
        self.token.write_text(materializing.keys.create_api_key(materializing.tenant, body).secret + "\n")
        self.write()

    def _alone(self, folder: Path) -> Path:
        """What one process makes with the same key; it dies before it can report."""
        torch.set_num_threads(1)
        self.order = self.of.order(max_shard_size=SMALL)
        apart = Order.model_validate(self.order | {"store": str(folder / "s"), "scratch": str(folder / "w")})
        keys = KeyService(apart.keysvc, apart.grant, transport=Watched(fail_at=":stage"))
        with keys, pytest.raises(ServiceError):
            run(apart, keys)
        return folder / "s" / apart.name

    def write(self, **changes: Any) -> None:
        """The task as every job reads it."""
        kept = {name: value for name, value in self.order.items() if name != "grant"}
        self.task.write_text(json.dumps(kept | {"parts": PARTS} | changes))

    def command(self, verb: str) -> list[str]:
        place = ["--task", str(self.task), "--token-file", str(self.token)]
        return [sys.executable, "-m", "anamorph.cli", "parts", verb, *place]

    def pod(self, index: int) -> subprocess.Popen[str]:
        """A pod of the Indexed Job: Kubernetes tells it its index."""
        return subprocess.Popen(
            self.command("fold"),
            env=ENVIRONMENT | {INDEX_VARIABLE: str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fold(self, *indices: int) -> list[tuple[int, str]]:
        """Run these pods beside each other; exit code and what each has said."""
        ended = []
        for pod in [self.pod(index) for index in indices]:
            with pod:
                out, err = pod.communicate()
                assert "Traceback" not in err
                ended.append((pod.returncode, out + err))
        return ended

    def finish(self) -> CompletedProcess[str]:
        return subprocess.run(
            self.command("finish"), env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

    def audit(self, *actions: str) -> list[Any]:
        """Parts that the audit log names, of these actions, in order."""
        written = everything(self.of.admin.audit, self.of.tenant)
        return [row.detail.get("part") for row in written if row.action in actions]

    @property
    def work(self) -> Path:
        """Where the parts lie until they are finished."""
        place: Path = self.of.scratch / self.of.tenant / "chat" / "v1"
        return place / ".replica.folding" / "replica"

    @property
    def published(self) -> Path:
        place: Path = self.of.store / self.of.tenant / "chat" / "v1"
        return place


@pytest.fixture
def site(materializing: Any, tmp_path: Path) -> Site:
    return Site(materializing, tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(site: Site) -> None:
    """Both parts beside each other, then the finishing job: not a byte differs from a single process."""
    ended = site.fold(0, 1)
    assert [code for code, _ in ended] == [0, 0], ended
    assert all(" 0 files" not in said for _, said in ended)
    done = site.finish()
    assert done.returncode == 0, done.stderr
    version = site.of.version
    assert version.state is State.STAGED
    verify(version.artifact.replica, b64decode(version.public_key), key_id=version.key_id)
    assert len(contents(site.published)) > 5
    assert contents(site.published) == contents(site.alone)
    assert not site.work.parents[1].exists()
    assert sorted(site.audit("grant")) == [0, 1]
    assert {0, 1, None} == set(site.audit("release"))


@pytest.mark.slow
def test_a_killed_pod_goes_on_under_a_new_grant(site: Site) -> None:
    """kill -9 of an index, and nothing is finished without it; started again, it ends in the same bytes."""
    with site.pod(0) as pod:
        while not list(site.work.glob("*")) and pod.poll() is None:
            time.sleep(0.001)
        os.kill(pod.pid, signal.SIGKILL)
    assert site.fold(0)[0][0] == 0
    assert site.audit("grant.renew")[-1] == 0
    early = site.finish()
    assert early.returncode == 1
    assert "part 1 of 2 is not made" in early.stderr
    assert site.of.version.state is State.MATERIALIZING
    assert site.fold(1)[0][0] == 0
    assert site.finish().returncode == 0
    assert contents(site.published) == contents(site.alone)


@pytest.mark.slow
def test_two_plans_never_meet_in_one_folder(site: Site) -> None:
    """Another layout or profile than that of the part before is refused by name; what is there stays."""
    assert site.fold(0)[0][0] == 0
    before = contents(site.work)
    for change in ({"max_shard_size": SMALL * 2}, {"profile": "permute"}):
        site.write(**change)
        code, said = site.fold(1)[0]
        assert (code, "another fold" in said) == (1, True), said
        assert site.finish().returncode == 1
    assert contents(site.work) == before
    assert site.of.version.state is State.MATERIALIZING


def test_an_index_outside_the_parts_is_refused(site: Site) -> None:
    """By its own task before anything is asked; by the key service where the task says other parts."""
    code, said = site.fold(2)[0]
    assert (code, "parts are 0 to 1" in said) == (2, True), said
    site.write(parts=3)
    code, said = site.fold(2)[0]
    assert (code, "in 2 parts, not in 3" in said) == (1, True), said
    assert site.audit("grant") == []
    assert not site.work.exists()


def test_a_stranger_gets_no_part(site: Site) -> None:
    """A credential of another role folds nothing, and is not repeated to anyone."""
    made = site.of.keys.create_api_key(site.of.tenant, ApiKeyCreate(name="c", role=Role.CLIENT))
    site.token.write_text(made.secret)
    code, said = site.fold(0)[0]
    assert code == 1
    assert made.secret not in said
    assert site.audit("grant") == []
