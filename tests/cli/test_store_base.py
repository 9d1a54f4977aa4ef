"""Bases from an object store: jobs against the real key service and a real S3-compatible server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from tests.servers.counting import Counting
from tests.servers.s3 import BUCKET, Server

from anamorph.replica import verify
from anamorph.wire.states import State

pytestmark = [pytest.mark.real, pytest.mark.slow]

PREFIX = f"s3://{BUCKET}/bases"
ANOTHER = f"sha256:{0:064}"

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def url(s3_server: Server, s3_port: Counting, base: Path) -> str:
    """The tiny model with a tokenizer beside it."""
    del s3_port  # started first, so that the environment names it
    place = f"{PREFIX}/{uuid.uuid4().hex}"
    for path in base.iterdir():
        s3_server.client().pipe_file(f"{place}/{path.name}", path.read_bytes())
    s3_server.client().pipe_file(f"{place}/tokenizer.json", b"{}")
    return place


@pytest.fixture
def digest(base: Path) -> str:
    from anamorph.checkpoint import Checkpoint

    return Checkpoint.open(base).digest()


def job(anamorph: Run, order: dict[str, Any]) -> CompletedProcess[str]:
    return anamorph("materialize", stdin=json.dumps(order))


def place(materializing: Any) -> Path:
    """Where the job works."""
    folder: Path = materializing.scratch / materializing.tenant / "chat" / "v1"
    return folder


def refused(materializing: Any, done: CompletedProcess[str]) -> str:
    """The reason of a version that failed for good before any key was released, and without a trace."""
    assert done.returncode == 3, done.stderr
    assert materializing.version.state is State.FAILED
    assert not any("release" in action for action in materializing.audit())
    assert not place(materializing).exists()
    reason: str = materializing.version.failure
    return reason


def test_a_job_takes_an_allowed_base(
    anamorph: Run, materializing: Any, url: str, s3_port: Counting, digest: str
) -> None:
    """``--allow-base s3://bucket/prefix/``: of the digest asked for, staged; nothing is left."""
    order = materializing.order(base=url, allow_base=[f"{PREFIX}/"], base_digest=digest)
    done = job(anamorph, order)
    assert done.returncode == 0, done.stderr
    version = materializing.version
    assert version.state is State.STAGED
    verify(version.artifact.replica, b64decode(version.public_key), key_id=version.key_id)
    assert not place(materializing).exists()
    assert s3_port.reads("tokenizer.json") == []


def test_a_base_outside_the_prefix_is_not_even_listed(
    anamorph: Run, materializing: Any, url: str, s3_port: Counting
) -> None:
    """A prefix covers whole names."""
    s3_port.requests.clear()
    done = job(anamorph, materializing.order(base=url, allow_base=[PREFIX[:-1], "/", f"{PREFIX}/x"]))
    assert "--allow-base" in refused(materializing, done)
    assert s3_port.requests == []


def test_what_the_base_lacks_is_named(anamorph: Run, materializing: Any, url: str, s3_server: Server) -> None:
    """The reason in the version's record says which file to upload."""
    s3_server.client().rm_file(f"{url}/config.json")
    done = job(anamorph, materializing.order(base=url, allow_base=[PREFIX]))
    assert f"{url} holds no config.json" in refused(materializing, done)


@pytest.mark.parametrize("where", ["store", "folder"])
def test_another_base_than_asked_for_is_refused(
    anamorph: Run, materializing: Any, url: str, digest: str, where: str
) -> None:
    """Both digests are named, wherever the base lies."""
    order = materializing.order(base_digest=ANOTHER)
    if where == "store":
        order |= {"base": url, "allow_base": [PREFIX]}
    reason = refused(materializing, job(anamorph, order))
    assert digest in reason
    assert ANOTHER in reason


def test_a_deleted_pod_ends_at_once_and_is_made_up_for(
    anamorph: Run, materializing: Any, url: str, s3_port: Counting
) -> None:
    """SIGTERM while the base comes: exit 143, no key was released; the next job goes on to STAGED."""
    options = materializing.pod(base=url, allow_base=[PREFIX])
    s3_port.delay_s = 0.5
    command = [sys.executable, "-m", "anamorph.cli", "materialize", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as pod:
        while not list(place(materializing).glob("base/*.partial")):
            assert pod.poll() is None, pod.communicate()
            time.sleep(0.01)
        pod.send_signal(signal.SIGTERM)
        assert (pod.wait(10), pod.communicate()[1]) == (143, "")
    s3_port.delay_s = 0
    assert not any("release" in action for action in materializing.audit())
    assert not materializing.store.exists()
    done = anamorph("materialize", *options)
    assert done.returncode == 0, done.stderr
    assert materializing.version.state is State.STAGED


def test_parts_share_one_copy_of_the_base(
    anamorph: Run, materializing: Any, url: str, s3_port: Counting
) -> None:
    """Two pods at the same moment fetch it once; who finishes takes the same copy, and removes it."""
    options = materializing.pod(base=url, allow_base=[PREFIX], max_shard_size=4000)
    materializing.keys.materialize(materializing.tenant, "chat", 1, parts=2)
    options[1].write_text(json.dumps(json.loads(options[1].read_text()) | {"parts": 2}))
    command = [sys.executable, "-m", "anamorph.cli", "parts", "fold", *map(str, options)]
    pods = [subprocess.Popen([*command, "--index", str(index)]) for index in range(2)]
    assert [pod.wait(120) for pod in pods] == [0, 0]
    assert anamorph("parts", "finish", *options).returncode == 0
    assert materializing.version.state is State.STAGED
    assert len(s3_port.reads("model.safetensors")) == 1
    assert not place(materializing).exists()
