"""The node's cache of replicas: what it admits, repairs, evicts and refuses. The store here is a folder."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anamorph.errors import ReplicaRefused, SetupError, StoreUnavailable
from anamorph.keys import TenantKey
from anamorph.replica import CHUNK, MANIFEST, Cache, Identity, ReplicaManifest, hold, seal
from anamorph.replica.room import ABANDONED_S

SHARD = "model-00002-of-00002.safetensors"
LIMIT = 2**30

MakeReplica = Callable[[str], tuple[Path, ReplicaManifest]]

HOLDER = """
import sys
from pathlib import Path
from anamorph.replica import Cache
folder, url, public_key, digest = sys.argv[1:]
cache = Cache(Path(folder), 2**30)
with cache.hold(url, bytes.fromhex(public_key), manifest_sha256=digest) as held:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def make(replica: Path, identity: Identity, key: TenantKey, tmp_path: Path) -> MakeReplica:
    """A replica of three chunks, about 9 MB; each name has content of its own."""

    def made(name: str) -> tuple[Path, ReplicaManifest]:
        folder = Path(shutil.copytree(replica, tmp_path / name))
        content = np.random.default_rng(list(name.encode())).integers(0, 2**30, 2**21 + 99, dtype=np.int32)
        save_file({"b": content.view(np.float32)}, folder / SHARD, metadata={"format": "pt"})
        (folder / MANIFEST).unlink()
        return folder, seal(folder, identity, key.sign)

    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextmanager
def holder(folder: Path, url: Path, key: TenantKey, digest: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that uses an entry until it is told to stop, or killed."""
    arguments = [sys.executable, "-c", HOLDER, folder, url, key.public_key().hex(), digest]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"held\n"
        yield process


def entries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "entries").iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def used_before(folder: Path, digest: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / "locks" / f"{digest}.use", (then, then))


def test_a_copy_is_whole_verified_and_found_without_the_store(
    make: MakeReplica, key: TenantKey, folder: Path
) -> None:
    """The second process to ask needs no store, as long as it knows the manifest's digest."""
    store, manifest = make("a")
    told: list[tuple[int, int]] = []
    cache = Cache(folder, LIMIT, progress=lambda *at: told.append(at))
    with cache.hold(store, key.public_key(), key_id=key.id, manifest_sha256=manifest.sha256()) as held:
        assert contents(held.folder) == contents(store)
        assert held.manifest == manifest
        held.check_unchanged()
    total = sum(file.size for file in manifest.files.values())
    assert told == sorted(told)
    assert told[-1] == (total, total)
    shutil.rmtree(store)
    told.clear()
    with cache.hold(store, key.public_key(), manifest_sha256=manifest.sha256()) as held:
        assert held.manifest == manifest
    assert told == []


def test_without_a_pinned_digest_the_store_says_which(
    make: MakeReplica, key: TenantKey, folder: Path
) -> None:
    """The signed manifest in the store names the entry, and one digest is one entry."""
    store, manifest = make("a")
    with Cache(folder, LIMIT).hold(store, key.public_key()) as held:
        assert held.folder.name == manifest.sha256()
    with Cache(folder, LIMIT).hold(store, key.public_key(), manifest_sha256=manifest.sha256()):
        assert entries(folder) == {manifest.sha256()}


def truncate(entry: Path) -> None:
    os.truncate(entry / SHARD, CHUNK + 5)


def link(entry: Path) -> None:
    (entry / SHARD).rename(entry.parent / "elsewhere")
    (entry / SHARD).symlink_to(entry.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "first byte": lambda entry: flip(entry / SHARD, 0),
    "last byte": lambda entry: flip(entry / SHARD, (entry / SHARD).stat().st_size - 1),
    "configuration": lambda entry: flip(entry / "config.json", 1),
    "manifest": lambda entry: flip(entry / MANIFEST, 100),
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "no shard": lambda entry: (entry / SHARD).unlink(),
    "half a shard": truncate,
    "longer": lambda entry: os.truncate(entry / SHARD, (entry / SHARD).stat().st_size + 1),
    "link": link,
    "stray file": lambda entry: (entry / "tokenizer.json").write_text("{}"),
    "stray folder": lambda entry: (entry / "sub").mkdir(),
    "empty": lambda entry: list(map(Path.unlink, entry.iterdir())),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_repaired_by_itself(
    damage: str, make: MakeReplica, key: TenantKey, folder: Path
) -> None:
    """Whatever happened to an entry, the next to ask gets the replica, also while others use the entry."""
    store, manifest = make("a")
    cache = Cache(folder, LIMIT)
    with cache.hold(store, key.public_key()) as held:
        DAMAGE[damage](held.folder)
        with cache.hold(store, key.public_key(), manifest_sha256=manifest.sha256()) as repaired:
            assert contents(repaired.folder) == contents(store)
            repaired.check_unchanged()


def test_only_what_is_damaged_is_written_again(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """A repair leaves right files alone: others may be reading them."""
    store, _ = make("a")
    cache = Cache(folder, LIMIT)
    with cache.hold(store, key.public_key()) as held:
        before = {path.name: path.stat() for path in held.folder.iterdir()}
        flip(held.folder / SHARD, CHUNK + 1)
        cache.hold(store, key.public_key()).close()
        after = {path.name: path.stat() for path in held.folder.iterdir()}
    assert {name for name in after if after[name].st_ctime_ns != before[name].st_ctime_ns} == {SHARD}
    assert after[SHARD].st_ino == before[SHARD].st_ino


def test_what_changes_after_verification_shows(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """A file that is written, replaced or removed between verification and the end of loading is noticed."""
    store, _ = make("a")
    changes: list[Callable[[Path], Any]] = [
        lambda place: flip(place / SHARD, 9),
        lambda place: shutil.copy(place / SHARD, place / "x.safetensors"),
        lambda place: (place / "config.json").write_bytes((place / "config.json").read_bytes()),
        lambda place: (place / MANIFEST).unlink(),
    ]
    for change in changes:
        for held in (hold(store, key.public_key()), Cache(folder, LIMIT).hold(store, key.public_key())):
            with held:
                copy = Path(shutil.copytree(held.folder, folder / "copy"))
                times = (held.folder / SHARD).stat()
                change(held.folder)
                # Times can be set back by anyone who may write; change times cannot.
                os.utime(held.folder / SHARD, ns=(times.st_atime_ns, times.st_mtime_ns))
                with pytest.raises(ReplicaRefused, match="changed"):
                    held.check_unchanged()
                shutil.rmtree(held.folder)
                copy.rename(held.folder)


def test_nothing_untrusted_is_admitted(
    make: MakeReplica, key: TenantKey, other_key: TenantKey, folder: Path
) -> None:
    """Another anchor, key id or digest, or an unsigned manifest: refused before anything is fetched."""
    store, manifest = make("a")
    cache = Cache(folder, LIMIT)
    for anchor, pins in (
        (other_key.public_key(), {}),
        (key.public_key(), {"key_id": other_key.id}),
        (key.public_key(), {"manifest_sha256": "0" * 64}),
        (other_key.public_key(), {"manifest_sha256": manifest.sha256()}),
    ):
        with pytest.raises(ReplicaRefused):
            cache.hold(store, anchor, **pins)
    assert entries(folder) == set()
    assert list((folder / "partial").iterdir()) == []


def test_another_anchor_gets_no_entry_and_harms_none(
    make: MakeReplica, key: TenantKey, other_key: TenantKey, folder: Path
) -> None:
    """An entry that others hold rightly is refused to who trusts another key, and stays as it is."""
    store, manifest = make("a")
    cache = Cache(folder, LIMIT)
    with cache.hold(store, key.public_key()) as held:
        with pytest.raises(ReplicaRefused):
            cache.hold(store, other_key.public_key(), manifest_sha256=manifest.sha256())
        held.check_unchanged()


@pytest.mark.parametrize("digest", ["../../etc", "A" * 64, "0" * 63, ""])
def test_a_digest_is_no_path(digest: str, make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """What names a folder is 64 hexadecimal digits or nothing."""
    store, manifest = make("a")
    if digest:
        with pytest.raises(ReplicaRefused, match="64"):
            Cache(folder, LIMIT).hold(store, key.public_key(), manifest_sha256=digest)
    else:
        assert Cache(folder, LIMIT).hold(store, key.public_key()).manifest == manifest


def test_a_store_that_is_not_what_its_manifest_says_is_refused(
    make: MakeReplica, key: TenantKey, folder: Path
) -> None:
    """A damaged chunk, a file too many or too few in the store: refused, and no entry remains."""
    store, manifest = make("a")
    flip(store / SHARD, CHUNK)
    with pytest.raises(ReplicaRefused, match=SHARD):
        Cache(folder, LIMIT).hold(store, key.public_key())
    flip(store / SHARD, CHUNK)
    (store / "more.safetensors").write_bytes(b"x")
    with pytest.raises(ReplicaRefused, match="more"):
        Cache(folder, LIMIT).hold(store, key.public_key())
    assert entries(folder) == set()
    assert list((folder / "partial").iterdir()) == []
    (store / "more.safetensors").unlink()
    with Cache(folder, LIMIT).hold(store, key.public_key()) as held:
        assert held.manifest == manifest


def test_the_least_recently_used_makes_room(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """Beyond the limit the entry goes that nobody has used for longest."""
    made = {name: make(name) for name in "abc"}
    size = sum(file.size for file in made["a"][1].files.values())
    cache = Cache(folder, int(2.5 * size))
    for age, name in enumerate("ab"):
        cache.hold(made[name][0], key.public_key()).close()
        used_before(folder, made[name][1].sha256(), 100 + age)
    cache.hold(made["c"][0], key.public_key()).close()
    assert entries(folder) == {made["a"][1].sha256(), made["c"][1].sha256()}
    assert len(list((folder / "locks").glob("*.use"))) == 2


def test_what_is_in_use_is_never_evicted(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """Not by this process, not by another; when its user has ended, however that happened, it may go."""
    (a, one), (b, two) = make("a"), make("b")
    size = sum(file.size for file in one.files.values())
    cache = Cache(folder, int(1.5 * size))
    with holder(folder, a, key, one.sha256()) as user:
        with pytest.raises(SetupError, match="in use"):
            cache.hold(b, key.public_key())
        assert contents(folder / "entries" / one.sha256()) == contents(a)
        user.kill()
        user.wait()
        with cache.hold(b, key.public_key()):
            assert entries(folder) == {two.sha256()}
            with pytest.raises(SetupError, match="in use"):
                cache.hold(a, key.public_key())


def test_a_replica_beyond_the_limit_is_refused_at_once(
    make: MakeReplica, key: TenantKey, folder: Path
) -> None:
    """Nothing is evicted or fetched for what can never fit; the message says what to raise."""
    (a, one), (b, _) = make("a"), make("b")
    Cache(folder, LIMIT).hold(a, key.public_key()).close()
    with pytest.raises(SetupError, match="limit_bytes"):
        Cache(folder, 1000).hold(b, key.public_key())
    assert entries(folder) == {one.sha256()}


def test_a_lower_limit_holds_from_the_next_use_on(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """A limit that was lowered is kept without anything being fetched."""
    (a, one), (b, two) = make("a"), make("b")
    for store in (a, b):
        Cache(folder, LIMIT).hold(store, key.public_key()).close()
    size = sum(file.size for file in one.files.values())
    Cache(folder, size + 1).hold(b, key.public_key(), manifest_sha256=two.sha256()).close()
    assert entries(folder) == {two.sha256()}


def test_a_full_disk_is_said_and_leaves_nothing(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """Where a file cannot grow, the error names the cache, and what was begun is removed."""
    store, _ = make("a")
    cache = Cache(folder, LIMIT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(SetupError, match=r"cannot write the cache.*cache\.folder"):
            cache.hold(store, key.public_key())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in (folder / "partial").rglob("*") if path.is_file()] == []
    cache.hold(store, key.public_key()).close()


KILLED = """
import os, signal, sys
from pathlib import Path
from anamorph.replica import Cache
def kill(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
Cache(Path(sys.argv[1]), 2**30, progress=kill).hold(sys.argv[2], bytes.fromhex(sys.argv[3]))
"""


def killed_halfway(folder: Path, store: Path, key: TenantKey) -> None:
    arguments = [sys.executable, "-c", KILLED, str(folder), str(store), key.public_key().hex()]
    assert subprocess.run(arguments, check=False).returncode == -9


def test_what_a_killed_process_began_is_taken_up(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """Its chunks are checked and kept: the store may have lost them since, and it does not matter."""
    store, manifest = make("a")
    killed_halfway(folder, store, key)
    assert entries(folder) == set()
    (partial,) = (folder / "partial").iterdir()
    assert (partial / SHARD).read_bytes()[:CHUNK] == (store / SHARD).read_bytes()[:CHUNK]
    whole = contents(store)
    flip(store / SHARD, 17)
    with Cache(folder, LIMIT).hold(store, key.public_key(), manifest_sha256=manifest.sha256()) as held:
        assert contents(held.folder) == whole
    assert list((folder / "partial").iterdir()) == []


def test_what_nobody_takes_up_is_removed(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """An abandoned fetch goes after an hour at the next use of the cache, and sooner if room is needed."""
    (a, _), (b, two) = make("a"), make("b")
    killed_halfway(folder, a, key)
    Cache(folder, LIMIT).hold(b, key.public_key()).close()
    (partial,) = (folder / "partial").iterdir()
    then = time.time() - ABANDONED_S - 1
    os.utime(folder / "locks" / f"{partial.name}.fill", (then, then))
    Cache(folder, LIMIT).hold(b, key.public_key()).close()
    assert list((folder / "partial").iterdir()) == []
    killed_halfway(folder, a, key)
    size = sum(file.size for file in two.files.values())
    Cache(folder, size + 2**20).hold(b, key.public_key()).close()
    assert list((folder / "partial").iterdir()) == []
    assert entries(folder) == {two.sha256()}


def test_half_removed_folders_are_cleared(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """What a process that was killed while it evicted has left is removed by the next one."""
    store, _ = make("a")
    Cache(folder, LIMIT)
    (folder / "trash" / "left").mkdir()
    (folder / "trash" / "left" / SHARD).write_bytes(b"x")
    Cache(folder, LIMIT).hold(store, key.public_key()).close()
    assert list((folder / "trash").iterdir()) == []


def test_a_fetch_that_stands_still_is_not_waited_for_for_ever(
    make: MakeReplica, key: TenantKey, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped while it fetched holds its lock; those who wait give up with its name."""
    from anamorph.replica import cache as module
    from anamorph.replica.locks import locked

    store, manifest = make("a")
    monkeypatch.setattr(module, "STALLED_S", 0.2)
    cache = Cache(folder, LIMIT)
    with (
        locked(folder / "locks" / f"{manifest.sha256()}.fill"),
        pytest.raises(StoreUnavailable, match="another process"),
    ):
        cache.hold(store, key.public_key())
    cache.hold(store, key.public_key()).close()


def test_the_folder_is_private(make: MakeReplica, key: TenantKey, folder: Path) -> None:
    """Folder and files are for one user; a folder that is open to others is refused with the remedy."""
    store, _ = make("a")
    with Cache(folder, LIMIT).hold(store, key.public_key()) as held:
        assert {path.stat().st_mode & 0o077 for path in [folder, *folder.rglob("*")]} == {0}
        assert held.folder.is_relative_to(folder)
    folder.chmod(0o750)
    with pytest.raises(SetupError, match="chmod 700"):
        Cache(folder, LIMIT)


def test_a_link_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    """The default folder has a known name where everyone may write: what lies there first is not trusted."""
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "theirs")
    with pytest.raises(SetupError, match="link"):
        Cache(tmp_path / "cache", LIMIT)
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError):
        Cache(tmp_path / "file", LIMIT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(folder: Path) -> None:
    """Whoever owns the folder could change what was verified."""
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(SetupError, match="another user"):
        Cache(folder, LIMIT)
