"""The node's cache before a real S3-compatible server, with every request to it counted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.servers.counting import Counting
from tests.servers.s3 import BUCKET, Server

from anamorph.errors import ReplicaRefused, StoreUnavailable
from anamorph.keys import TenantKey
from anamorph.replica import (
    CHUNK,
    MANIFEST,
    Cache,
    Identity,
    RangedReplica,
    ReplicaManifest,
    Store,
    Tensors,
    files,
    fill,
    ranged,
    seal,
)

pytestmark = [pytest.mark.real, pytest.mark.slow]

SHARD = "model-00002-of-00002.safetensors"
LIMIT = 2**30
ACTORS = 5

ACTOR = """
import sys
from pathlib import Path
from anamorph.replica import Cache
folder, url, public_key, digest = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with Cache(Path(folder), 2**30).hold(url, bytes.fromhex(public_key), manifest_sha256=digest) as held:
    held.check_unchanged()
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def big(replica: Path, identity: Identity, key: TenantKey) -> ReplicaManifest:
    """``replica`` with a shard of six chunks in it, and what its manifest says now."""
    content = np.random.default_rng(0).standard_normal((3000, 1800), dtype=np.float32)
    save_file({"b": content}, replica / SHARD, metadata={"format": "pt"})
    (replica / MANIFEST).unlink()
    return seal(replica, identity, key.sign)


@pytest.fixture
def url(s3_port: Counting, replica: Path, big: ReplicaManifest) -> str:
    """The published replica; requests are counted from here on."""
    assert len(big.files[SHARD].chunks) == 6
    place = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}").publish(replica, "acme/tiny/v1")
    s3_port.requests.clear()
    return place


Actor = subprocess.Popen[bytes]


@pytest.fixture
def actors(url: str, key: TenantKey, big: ReplicaManifest, tmp_path: Path) -> Iterator[list[Actor]]:
    """Processes that wait for ``go``, then ask one cache for the replica; ended after the test."""
    folder = str(tmp_path / "cache")
    arguments = [sys.executable, "-c", ACTOR, folder, url, key.public_key().hex(), big.sha256()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ExitStack() as stack:
        started: list[Actor] = []
        for _ in range(ACTORS):
            started.append(stack.enter_context(subprocess.Popen(arguments, **pipes)))  # type: ignore[call-overload]
            stack.callback(started[-1].kill)
        assert [said(actor) for actor in started] == [b"ready\n"] * ACTORS
        yield started


def said(actor: Actor) -> bytes:
    assert actor.stdout is not None
    return actor.stdout.readline()


def go(actor: Actor) -> None:
    assert actor.stdin is not None
    actor.stdin.write(b"\n")
    actor.stdin.flush()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetched(s3_port: Counting) -> Counter[tuple[str, str]]:
    """How often each range of each file but the manifest was asked for."""
    objects = (one for one in s3_port.reads() if one.range and not one.path.endswith(MANIFEST))
    return Counter((one.path, one.range) for one in objects)


def test_many_actors_download_once(
    actors: list[Actor], s3_port: Counting, replica: Path, big: ReplicaManifest, tmp_path: Path
) -> None:
    """Five processes that start at the same moment ask the store once for each chunk, and all get it."""
    for actor in actors:
        go(actor)
    assert [said(actor) for actor in actors] == [b"held\n"] * ACTORS
    chunks = sum(len(file.chunks) for file in big.files.values())
    assert list(fetched(s3_port).values()) == [1] * chunks
    assert len(s3_port.reads(MANIFEST)) == 1
    assert contents(tmp_path / "cache" / "entries" / big.sha256()) == contents(replica)
    for actor in actors:
        go(actor)
        assert actor.wait() == 0


def test_a_process_killed_while_it_downloads_is_succeeded(
    actors: list[Actor], s3_port: Counting, replica: Path, big: ReplicaManifest, tmp_path: Path
) -> None:
    """kill -9 in the middle: one of those who waited goes on from the chunks that are there."""
    s3_port.delay_s = 0.3
    go(actors[0])
    while len(s3_port.reads(SHARD)) < 3:
        time.sleep(0.005)
    for actor in actors[1:]:
        go(actor)
    actors[0].kill()
    assert actors[0].wait() == -signal.SIGKILL
    assert [said(actor) for actor in actors[1:]] == [b"held\n"] * (ACTORS - 1)
    # Fetched by the first, perhaps begun by it, and then by one successor at most.
    assert max(fetched(s3_port).values()) <= 2
    entry = tmp_path / "cache" / "entries" / big.sha256()
    assert contents(entry) == contents(replica)
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


def test_a_flipped_byte_costs_one_chunk(
    url: str, s3_port: Counting, replica: Path, big: ReplicaManifest, key: TenantKey, tmp_path: Path
) -> None:
    """The damaged chunk of an entry, and nothing else, is fetched again."""
    cache = Cache(tmp_path / "cache", LIMIT)
    with cache.hold(url, key.public_key()) as held:
        with (held.folder / SHARD).open("r+b") as file:
            file.seek(2 * CHUNK + 7)
            byte = file.read(1)
            file.seek(2 * CHUNK + 7)
            file.write(bytes([byte[0] ^ 1]))
        s3_port.requests.clear()
        with cache.hold(url, key.public_key(), manifest_sha256=big.sha256()) as repaired:
            assert contents(repaired.folder) == contents(replica)
    assert [one.range for one in s3_port.reads(SHARD)] == [f"bytes={2 * CHUNK}-{3 * CHUNK - 1}"]
    assert len(fetched(s3_port)) == 1


def test_without_the_store_what_is_here_is_enough(
    url: str, s3_port: Counting, big: ReplicaManifest, key: TenantKey, tmp_path: Path
) -> None:
    """An entry that is whole starts engines while the store is away."""
    cache = Cache(tmp_path / "cache", LIMIT)
    cache.hold(url, key.public_key()).close()
    s3_port.requests.clear()
    with cache.hold(url, key.public_key(), manifest_sha256=big.sha256()) as held:
        assert held.manifest == big
    assert s3_port.requests == []


def test_a_store_that_goes_away_is_an_error_and_what_came_is_kept(
    url: str,
    s3_port: Counting,
    replica: Path,
    big: ReplicaManifest,
    key: TenantKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No endless tries, no refusal of a good replica; the next try goes on from what came."""
    monkeypatch.setattr(ranged, "WAITS_S", (0.01, 0.02))
    monkeypatch.setattr(files, "ANSWER_TIMEOUT_S", 1.0)
    # One after the other, so that some are missing when the store goes.
    monkeypatch.setattr(fill, "THREADS", 1)

    def cut(done: int, _total: int) -> None:
        s3_port.cut = done > 2 * CHUNK

    with pytest.raises(StoreUnavailable):
        Cache(tmp_path / "cache", LIMIT, progress=cut).hold(url, key.public_key())
    s3_port.cut = False
    s3_port.requests.clear()
    with Cache(tmp_path / "cache", LIMIT).hold(url, key.public_key()) as held:
        assert contents(held.folder) == contents(replica)
    assert 0 < len(s3_port.reads(SHARD)) < len(big.files[SHARD].chunks)


def test_a_read_that_hangs_ends(
    url: str, s3_port: Counting, key: TenantKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that takes connections and never answers is given up."""
    monkeypatch.setattr(ranged, "WAITS_S", ())
    monkeypatch.setattr(files, "ANSWER_TIMEOUT_S", 0.5)
    s3_port.delay_s = 20
    with pytest.raises(StoreUnavailable):
        Cache(tmp_path / "cache", LIMIT).hold(url, key.public_key())


def test_a_slice_costs_the_chunks_that_it_touches(
    url: str, s3_port: Counting, replica: Path, key: TenantKey, s3_server: Server
) -> None:
    """A rank reads rows of a tensor from the store: the header's chunk, the rows' chunks, no others."""
    content = np.random.default_rng(0).standard_normal((3000, 1800), dtype=np.float32)
    with RangedReplica.open(url, key.public_key(), key_id=key.id) as source:
        found = Tensors(source).read("b", slice(1500, 2000), slice(600, 1200)).view(np.float32)
        np.testing.assert_array_equal(found, content[1500:2000, 600:1200])
        first, last = 1500 * 7200 // CHUNK, 2000 * 7200 // CHUNK
        assert len(s3_port.reads(SHARD)) == 1 + last - first + 1
        data = bytearray((replica / SHARD).read_bytes())
        data[5 * CHUNK + 1] ^= 1
        s3_server.client().pipe_file(f"{url}/{SHARD}", bytes(data))
        Tensors(source).read("b", slice(0, 10))
        with pytest.raises(ReplicaRefused, match=SHARD):
            Tensors(source).read("b", slice(2990, 3000))
