"""The store on a real S3-compatible server: SeaweedFS, in a process of its own, on free loopback ports."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
from safetensors.numpy import save_file
from tests.servers.s3 import BUCKET, Server

from anamorph.errors import ReplicaExists, ReplicaRefused, SetupError
from anamorph.keys import TenantKey
from anamorph.replica import MANIFEST, Identity, Store, fetch, seal, verify

pytestmark = [pytest.mark.real, pytest.mark.slow]

NAME = "acme/tiny/v1"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def store(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store; its credentials are in the environment only. ``S3FileSystem()`` is its very client."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def objects(s3_server: Server, store: Store) -> list[str]:
    """Names of the objects in the store, as another client sees them."""
    root = store.url.removeprefix("s3://")
    return [path.removeprefix(f"{root}/") for path in s3_server.client().find(root)]


def test_a_published_replica_verifies_by_url_and_is_fetched_whole(
    store: Store, s3_server: Server, replica: Path, key: TenantKey, tmp_path: Path
) -> None:
    """Publish, exists, list, verify where it lies, fetch, verify the copy."""
    assert not store.exists(NAME)
    assert store.list() == []
    url = store.publish(replica, NAME)
    assert url == f"{store.url}/{NAME}"
    assert store.exists(NAME)
    assert store.list() == [NAME]
    assert verify(url, key.public_key()) == verify(store.fetch(NAME, tmp_path / "copy"), key.public_key())
    assert objects(s3_server, store) == sorted(f"{NAME}/{path.name}" for path in replica.iterdir())


def test_a_name_is_never_overwritten(store: Store, s3_server: Server, replica: Path, key: TenantKey) -> None:
    """Publishing again is an error and touches no object."""
    url = store.publish(replica, NAME)
    before = s3_server.client().find(url, detail=True)
    with pytest.raises(ReplicaExists):
        store.publish(replica, NAME)
    assert len(before) == len(list(replica.iterdir()))
    assert s3_server.client().find(url, detail=True) == before
    verify(url, key.public_key())


def test_of_two_publishers_the_slower_is_told(
    store: Store, s3_server: Server, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that appears while the shards go up is not overwritten: the server's condition decides."""
    other, own = s3_server.client(), s3fs.S3FileSystem()
    put = own.put_file

    def overtaken(*args: Any, **options: Any) -> None:
        put(*args, **options)
        other.pipe_file(f"{store.url}/{NAME}/{MANIFEST}", b"the winner's")

    monkeypatch.setattr(own, "put_file", overtaken)
    with pytest.raises(ReplicaExists):
        store.publish(replica, NAME)
    assert other.cat_file(f"{store.url}/{NAME}/{MANIFEST}") == b"the winner's"


def test_one_flipped_byte_in_an_object_is_refused(
    store: Store, s3_server: Server, replica: Path, key: TenantKey, tmp_path: Path
) -> None:
    """Verification by URL and of a fetched copy both refuse it."""
    url = store.publish(replica, NAME)
    data = bytearray((replica / SHARD).read_bytes())
    data[-1] ^= 1
    s3_server.client().pipe_file(f"{url}/{SHARD}", bytes(data))
    with pytest.raises(ReplicaRefused, match=SHARD):
        verify(url, key.public_key())
    with pytest.raises(ReplicaRefused, match=SHARD):
        verify(fetch(url, tmp_path / "copy"), key.public_key())


@pytest.mark.parametrize("change", ["added", "removed"])
def test_an_object_too_many_or_too_few_is_refused(
    store: Store, s3_server: Server, replica: Path, key: TenantKey, change: str
) -> None:
    """What the manifest lists is all there is, and all of it is there."""
    url = store.publish(replica, NAME)
    if change == "added":
        s3_server.client().pipe_file(f"{url}/model-00003-of-00003.safetensors", b"x")
    else:
        s3_server.client().rm_file(f"{url}/{SHARD}")
    with pytest.raises(ReplicaRefused):
        verify(url, key.public_key())


def test_a_deleted_name_is_free_again(store: Store, s3_server: Server, replica: Path, key: TenantKey) -> None:
    """Every object is gone, deleting nothing is no error, other names stay."""
    store.publish(replica, NAME)
    store.publish(replica, "acme/tiny/v10")
    store.delete(NAME)
    store.delete(NAME)
    assert not store.exists(NAME)
    assert store.list() == ["acme/tiny/v10"]
    assert not [one for one in objects(s3_server, store) if one.startswith(f"{NAME}/")]
    verify(store.publish(replica, NAME), key.public_key())


def test_a_publisher_killed_halfway_has_published_nothing(
    store: Store, s3_server: Server, replica: Path, key: TenantKey
) -> None:
    """SIGKILL after the first object: the name is free, and the next publication is whole."""
    code = (
        "import os, signal, sys; from pathlib import Path; import s3fs; from anamorph.replica import Store\n"
        "store, own = Store(sys.argv[1]), s3fs.S3FileSystem()\n"
        "put = own.put_file\n"
        "def killed(*args, **options):\n"
        "    put(*args, **options); os.kill(os.getpid(), signal.SIGKILL)\n"
        "own.put_file = killed\n"
        "store.publish(Path(sys.argv[2]), sys.argv[3])\n"
    )
    arguments = [sys.executable, "-c", code, store.url, str(replica), NAME]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert len(objects(s3_server, store)) == 1
    assert not store.exists(NAME)
    assert store.list() == []
    with pytest.raises(ReplicaRefused):
        verify(store.url_of(NAME), key.public_key())
    verify(store.publish(replica, NAME), key.public_key())


def test_the_manifest_is_the_last_object(
    store: Store, s3_server: Server, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever an object has gone up, the manifest has not, until all others have."""
    own = s3fs.S3FileSystem()
    put = own.put_file
    seen: list[list[str]] = []

    def watched(*args: Any, **options: Any) -> None:
        put(*args, **options)
        seen.append(objects(s3_server, store))

    monkeypatch.setattr(own, "put_file", watched)
    store.publish(replica, NAME)
    assert len(seen[-1]) == len(list(replica.iterdir())) - 1
    assert not any(one.endswith(MANIFEST) for names in seen for one in names)


def test_a_shard_of_several_parts_arrives_whole(
    store: Store, s3_server: Server, replica: Path, key: TenantKey, identity: Identity
) -> None:
    """A shard above twice s3fs's chunk size goes up in parts, and verifies by URL byte for byte."""
    save_file({"a": np.zeros(28 * 2**20, dtype=np.float32)}, replica / SHARD, metadata={"format": "pt"})
    (replica / MANIFEST).unlink()
    seal(replica, identity, key.sign)
    url = store.publish(replica, NAME)
    # The tag of an upload in parts ends with their number.
    assert s3_server.client().info(f"{url}/{SHARD}")["ETag"].strip('"').endswith("-3")
    verify(url, key.public_key())


def test_wrong_credentials_publish_nothing(
    store: Store, s3_server: Server, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment decides who may write; the error repeats no secret."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError) as caught:
        Store(store.url).publish(replica, NAME)
    assert "not-the-secret" not in str(caught.value)
    assert objects(s3_server, store) == []


def test_credentials_in_a_url_are_refused(s3_server: Server, replica: Path) -> None:
    """Even right ones: a URL is written into records and logs."""
    host = f"{s3_server.access}:{s3_server.secret}@{BUCKET}"
    for refused in (lambda: Store(f"s3://{host}/x"), lambda: fetch(f"s3://{host}/x", replica / "copy")):
        with pytest.raises(SetupError) as caught:
            refused()
        assert s3_server.secret not in str(caught.value)
