"""The store: a name appears whole or not at all, and is never overwritten."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import fsspec
import pytest

from anamorph.errors import ReplicaError, ReplicaExists, ReplicaRefused, SetupError
from anamorph.keys import TenantKey
from anamorph.replica import MANIFEST, Store, fetch, verify
from anamorph.replica.location import local_path

NAME = "acme/tiny/v1"


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = tmp_path / "store"
    unique = uuid.uuid4().hex
    urls = {"folder": str(root), "file": f"file://{root}", "memory": f"memory://{unique}/"}
    return Store(urls[request.param])


def test_what_is_published_verifies_where_it_lies(store: Store, replica: Path, key: TenantKey) -> None:
    """The URL that ``publish`` answers is a replica that passes verification."""
    assert not store.exists(NAME)
    url = store.publish(replica, NAME)
    assert url == store.url_of(NAME)
    assert store.exists(NAME)
    assert verify(url, key.public_key()).key_id == key.id


def test_a_published_replica_is_fetched_whole(
    store: Store, replica: Path, key: TenantKey, tmp_path: Path
) -> None:
    """A fetched copy verifies by itself, and an existing folder is not touched."""
    url = store.publish(replica, NAME)
    into = store.fetch(NAME, tmp_path / "cache" / "copy")
    verify(into, key.public_key())
    with pytest.raises(ReplicaExists):
        fetch(url, into)
    assert [path.name for path in into.parent.iterdir()] == ["copy"]


def test_a_name_is_never_overwritten(store: Store, replica: Path, key: TenantKey) -> None:
    """Publishing again is an error and leaves the first one as it was."""
    url = store.publish(replica, NAME)
    with pytest.raises(ReplicaExists):
        store.publish(replica, NAME)
    verify(url, key.public_key())


def test_a_deleted_name_is_free_again(store: Store, replica: Path) -> None:
    """Deleting is complete, and deleting nothing is no error."""
    store.publish(replica, NAME)
    store.delete(NAME)
    assert not store.exists(NAME)
    store.delete(NAME)
    store.publish(replica, NAME)
    assert store.list() == [NAME]


def test_the_list_holds_every_replica_and_nothing_else(store: Store, replica: Path) -> None:
    """An empty store lists nothing; afterwards names come back sorted."""
    assert store.list() == []
    for name in ("globex/b/v2", "acme/a/v10"):
        store.publish(replica, name)
    assert store.list() == ["acme/a/v10", "globex/b/v2"]


def test_an_unsealed_folder_is_not_published(store: Store, replica: Path) -> None:
    """Without a manifest there is nothing to publish."""
    (replica / MANIFEST).unlink()
    with pytest.raises(ReplicaRefused, match="seal it"):
        store.publish(replica, NAME)
    assert store.list() == []


def test_a_stray_file_is_not_published(store: Store, replica: Path) -> None:
    """A tokenizer that found its way into the folder never reaches the store."""
    (replica / "tokenizer.json").write_text("{}")
    with pytest.raises(ReplicaRefused):
        store.publish(replica, NAME)
    assert store.list() == []


def test_fetching_what_is_not_there_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    """A missing replica is refused, and no half-made folder remains."""
    with pytest.raises(ReplicaRefused):
        store.fetch(NAME, tmp_path / "cache" / "copy")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", "/etc", "../x", "a/../b", "a//b", "a/.hidden", "a\\b\n", "a/b/", "~", "a b"]
)
def test_a_name_cannot_leave_the_store(store: Store, replica: Path, name: str) -> None:
    """Only plain segments are names."""
    with pytest.raises(ReplicaError):
        store.publish(replica, name)
    with pytest.raises(ReplicaError):
        store.delete(name)


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:secret@bucket/x",
        "s3://bucket/x?secret=1",
        "s3://bucket/x#secret",
        "http://host/x",
        "zip::file:///x",
        "simplecache::s3://bucket/x",
        "file://host/x",
    ],
)
def test_credentials_and_odd_schemes_are_refused_unseen(url: str) -> None:
    """A URL is a place only; what it carries besides is refused and not repeated in the message."""
    with pytest.raises(SetupError) as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def test_a_failed_copy_publishes_nothing(
    tmp_path: Path, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while copying leaves neither the name nor a staging folder."""
    copied: list[Path] = []

    def full_after_two(source: Path, target: Path, **options: bool) -> Path:
        copied.append(target)
        if len(copied) > 2:
            raise OSError(28, "No space left on device")
        return original(source, target, **options)

    original = shutil.copyfile
    monkeypatch.setattr("anamorph.replica.store.shutil.copyfile", full_after_two)
    with pytest.raises(OSError, match="No space"):
        Store(tmp_path / "store").publish(replica, NAME)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_what_a_killed_publisher_left_is_removed(tmp_path: Path, replica: Path) -> None:
    """A staging folder of the same name goes away with the next publication, others stay."""
    parent = tmp_path / "store" / "acme" / "tiny"
    for left in (".staging-v1-0123", ".staging-v2-0123"):
        (parent / left).mkdir(parents=True)
    Store(tmp_path / "store").publish(replica, NAME)
    assert sorted(path.name for path in parent.iterdir()) == [".staging-v2-0123", "v1"]


def test_a_full_disk_while_fetching_is_no_fault_of_the_replica(
    tmp_path: Path, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays an OSError, so that nobody gives a sound replica up."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anamorph.replica.store._move", full)
    with pytest.raises(OSError, match="No space"):
        fetch(replica, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_upload_that_died_is_invisible_and_replaced(replica: Path, key: TenantKey) -> None:
    """Objects without their manifest are no replica, and a stray shard of theirs does not survive."""
    root = uuid.uuid4().hex
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file(f"/{root}/{NAME}/model-00001-of-00009.safetensors", b"left over")
    store = Store(f"memory://{root}")
    assert not store.exists(NAME)
    assert store.list() == []
    verify(store.publish(replica, NAME), key.public_key())


def test_the_manifest_is_uploaded_last(replica: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a shard fails to upload, no manifest has gone up before it."""
    store = Store(f"memory://{uuid.uuid4().hex}")

    def fail(*_: object, **__: object) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr(fsspec.filesystem("memory"), "put_file", fail)
    with pytest.raises(OSError, match="connection reset"):
        store.publish(replica, NAME)
    assert not store.exists(NAME)


def test_a_local_store_is_a_folder(tmp_path: Path) -> None:
    """Paths and file URLs need no fetching; object stores do."""
    assert local_path(f"file://{tmp_path}/x") == local_path(tmp_path / "x") == tmp_path / "x"
    assert local_path("memory://x") is None
