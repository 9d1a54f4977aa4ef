"""A materialisation job as a pod runs it: its task and its credential in files, its grant its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from tests.cli.conftest import Materializing, Service, started

from anamorph.cli.materialize import Whole
from anamorph.cli.task import under_grant
from anamorph.errors import Conflict
from anamorph.wire.admin import ReleaseRead, Role
from anamorph.wire.keyservice import KeyService
from anamorph.wire.states import State

pytestmark = pytest.mark.real

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A key service whose grants last a second."""
    home = tmp_path_factory.mktemp("hasty") / "home"
    with started(home, ANAMORPH_KEYSVC_GRANT_TTL_S="1") as running:
        yield running


@pytest.mark.slow
def test_a_job_asks_for_its_own_grant(anamorph: Run, materializing: Any) -> None:
    """Exit 0, STAGED, and the replica's URL; an older grant of the version is void from then on."""
    done = anamorph("materialize", *materializing.pod(workers=2))
    assert done.returncode == 0, done.stderr
    version = materializing.version
    assert version.state is State.STAGED
    assert done.stdout.strip() == version.artifact.replica
    assert materializing.audit().count("grant.renew") == 1
    assert not materializing.scratch.joinpath(materializing.tenant, "chat", "v1").exists()


class Downloading:
    """Work that outlasts its first grants, as a long download does, while the pod's token is replaced."""

    def __init__(self, site: Materializing, token: Path, times: int) -> None:
        self._site, self._token, self._left = site, token, times
        self.seen: list[KeyService] = []

    def __call__(self, keys: KeyService) -> ReleaseRead:
        self.seen.append(keys)
        if self._left:
            self._left -= 1
            self._token.write_text(self._site.credential())
            time.sleep(1.1)
        return keys.release(self._site.tenant, "chat", 1, "materialize")


@pytest.fixture
def brief(hasty: Service, tmp_path: Path) -> Iterator[Materializing]:
    with closing(Materializing(hasty, tmp_path, tmp_path)) as made:
        yield made


def test_a_grant_that_was_outlasted_is_asked_for_anew(brief: Materializing) -> None:
    """With the credential that lies in the file by then; the work is done again from its start."""
    _, task, _, token = brief.pod()
    before = token.read_text()
    work = Downloading(brief, token, times=1)
    released = under_grant(Whole.model_validate_json(task.read_bytes()), token, work)
    assert released.key_id == brief.version.key_id
    assert len(set(work.seen)) == 2
    assert token.read_text() != before
    assert brief.audit().count("release") == 1


def test_a_grant_is_asked_for_anew_once_only(brief: Materializing) -> None:
    """Work that takes longer each time ends, and the version still waits."""
    _, task, _, token = brief.pod()
    work = Downloading(brief, token, times=9)
    with pytest.raises(Conflict, match="expired"):
        under_grant(Whole.model_validate_json(task.read_bytes()), token, work)
    assert len(work.seen) == 2
    assert brief.version.state is State.MATERIALIZING


def test_a_credential_of_no_materialiser_ends_the_job(anamorph: Run, materializing: Any) -> None:
    """One of another role, and none at all: exit 1, nothing of it is repeated, nothing is released."""
    options = materializing.pod()
    for token in (materializing.credential(Role.CLIENT), "", "nonsense"):
        options[3].write_text(token)
        done = anamorph("materialize", *options)
        assert done.returncode == 1, done.stderr
        assert not token or token not in done.stderr
        assert "Traceback" not in done.stderr
    assert "release" not in materializing.audit()
    assert materializing.version.state is State.MATERIALIZING


@pytest.mark.parametrize("kept", [slice(0, 2), slice(2, 4)])
def test_task_and_credential_go_together(anamorph: Run, materializing: Any, kept: slice) -> None:
    """One without the other is wrong usage, and is not taken for an order on standard input."""
    done = anamorph("materialize", *materializing.pod()[kept])
    assert done.returncode == 2
    assert "go together" in done.stderr


def test_a_malformed_task_is_exit_2(anamorph: Run, materializing: Any) -> None:
    """The file and the field are named; a digest is one, or it is none."""
    options = materializing.pod(base_digest="sha256:1234")
    done = anamorph("materialize", *options)
    assert done.returncode == 2
    assert f"{options[1]} is malformed: base_digest" in done.stderr
    options[1].write_text(json.dumps({"grant": "secret"}))
    assert anamorph("materialize", *options).returncode == 2
