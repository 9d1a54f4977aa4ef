"""Plaintext checkpoints of a real S3-compatible server: what comes, what is refused, what goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import s3fs
from safetensors.numpy import save_file
from tests.servers.counting import Counting
from tests.servers.s3 import BUCKET, Server

from anamorph.errors import BaseRefused, CheckpointError, Conflict, StoreUnavailable
from anamorph.replica import CHUNK, files, ranged
from anamorph.replica.plain import fetch_plain

pytestmark = [pytest.mark.real, pytest.mark.slow]

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
READ = sorted(["config.json", "generation_config.json", INDEX, *SHARDS])
CHUNKS = 10  # of the second shard: more than are fetched at a time
LEFT_ALONE = {
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"code",
    "tokenizer.json": b"{}",
    "consolidated.safetensors": b"the same weights once more",
    "onnx/model.safetensors": b"another format",
}

KILLED = """
import os, signal, sys
from pathlib import Path
from anamorph.replica.plain import fetch_plain
url, into, after = sys.argv[1:]
def kill(done, total):
    if done > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
fetch_plain(url, Path(into), kill)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a checkpoint in two shards, one of them of several chunks."""
    folder = tmp_path_factory.mktemp("model")
    rows = np.random.default_rng(0).standard_normal((CHUNKS, CHUNK // 4), dtype=np.float32)
    for name, tensors in zip(SHARDS, ({"a": rows[0, :64]}, {"b": rows[:, :-64]}), strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "generation_config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Bucket:
    """One checkpoint's folder, as another client sees it."""

    def __init__(self, s3_server: Server) -> None:
        self.url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        self._client = s3_server.client()

    def put(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            self._client.pipe_file(f"{self.url}/{name}", content)


@pytest.fixture
def bucket(s3_server: Server, s3_port: Counting) -> Bucket:
    del s3_port  # started first, so that the environment names it
    return Bucket(s3_server)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def folders(into: Path) -> list[str]:
    return [path.name for path in into.iterdir() if path.is_dir()]


def test_exactly_what_is_read_is_fetched(
    bucket: Bucket, s3_port: Counting, model: dict[str, bytes], tmp_path: Path
) -> None:
    """Configurations, index and its shards, each byte once; no pickle, code or tokenizer."""
    bucket.put(model | LEFT_ALONE)
    seen: list[tuple[int, int]] = []
    fetched = fetch_plain(bucket.url, tmp_path / "base", lambda *done: seen.append(done))
    assert contents(fetched) == model
    assert sorted({one.path.rsplit("/", 1)[-1] for one in s3_port.reads() if one.range}) == READ
    assert len(s3_port.reads(SHARDS[1])) == CHUNKS
    total = sum(map(len, model.values()))
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_one_file_counts_before_an_index(bucket: Bucket, model: dict[str, bytes], tmp_path: Path) -> None:
    """As a fold reads a folder: with ``model.safetensors`` there is no index, and no shard."""
    files = {"config.json": model["config.json"], "model.safetensors": model[SHARDS[0]]}
    bucket.put(model | files)
    fetched = fetch_plain(bucket.url + "/", tmp_path / "base")
    assert contents(fetched) == files | {"generation_config.json": b"{}"}


def test_what_is_here_is_not_fetched_again(
    bucket: Bucket, s3_port: Counting, model: dict[str, bytes], tmp_path: Path
) -> None:
    """The same objects: one listing and the index, and the same folder."""
    bucket.put(model)
    fetched = fetch_plain(bucket.url, tmp_path / "base")
    s3_port.requests.clear()
    assert fetch_plain(bucket.url, tmp_path / "base") == fetched
    assert {one.path.rsplit("/", 1)[-1] for one in s3_port.reads() if one.range} == {INDEX}


@pytest.mark.parametrize("lost", ["config.json", INDEX, SHARDS[1]])
def test_what_is_missing_is_named(bucket: Bucket, model: dict[str, bytes], tmp_path: Path, lost: str) -> None:
    """Before any shard is fetched, and nothing is left behind that looks like a checkpoint."""
    bucket.put({name: content for name, content in model.items() if name != lost})
    with pytest.raises(BaseRefused, match=lost):
        fetch_plain(bucket.url, tmp_path / "base")
    assert folders(tmp_path / "base") == []


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        *(
            (json.dumps({"weight_map": {"a": wish}}), "plain name")
            for wish in ("../x.safetensors", "a.bin", "*")
        ),
        *(
            (text, "weight_map")
            for text in ("{}", "[]", "no json", '{"weight_map": []}', '{"weight_map": {}}')
        ),
        ("", "0 bytes"),
    ],
)
def test_an_index_cannot_name_files_elsewhere(
    bucket: Bucket, tmp_path: Path, index: str, reason: str
) -> None:
    """A weight map is not a list of wishes; one that is none is refused by name."""
    bucket.put({"config.json": b"{}", INDEX: index.encode()})
    with pytest.raises(BaseRefused, match=reason):
        fetch_plain(bucket.url, tmp_path / "base")


@pytest.mark.usefixtures("s3_port")
def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """No such folder and no such bucket are refusals: another attempt would find nothing either."""
    for url in (f"s3://{BUCKET}/nowhere", f"s3://{uuid.uuid4().hex}/x"):
        with pytest.raises(BaseRefused, match="check the name"):
            fetch_plain(url, tmp_path / "base")


def test_a_stranger_is_refused(
    bucket: Bucket, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that the store does not accept: said so, and not repeated."""
    bucket.put(model)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(BaseRefused, match="credentials") as caught:
        fetch_plain(bucket.url, tmp_path / "base")
    assert "hunter2" not in str(caught.value)


def test_a_killed_fetch_goes_on(
    bucket: Bucket, s3_port: Counting, model: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL in the middle of a file: nothing bears its name, and the next call asks only for the rest."""
    bucket.put(model)
    into = tmp_path / "base"
    arguments = [sys.executable, "-c", KILLED, bucket.url, str(into), str(8 * CHUNK)]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    [partial] = folders(into)
    assert partial.endswith(".partial")
    s3_port.requests.clear()
    assert contents(fetch_plain(bucket.url, into)) == model
    assert 0 < len(s3_port.reads(SHARDS[1])) < CHUNKS
    assert len(folders(into)) == 1


def test_a_void_grant_ends_a_fetch(bucket: Bucket, model: dict[str, bytes], tmp_path: Path) -> None:
    """What progress raises comes out as it is, in the middle; what is there stays for the next call."""
    bucket.put(model)

    def void(done: int, _total: int) -> None:
        if done > CHUNK:
            raise Conflict("a newer grant has taken this one's place: stop")

    with pytest.raises(Conflict):
        fetch_plain(bucket.url, tmp_path / "base", void)
    assert contents(fetch_plain(bucket.url, tmp_path / "base")) == model


def test_a_checkpoint_that_changes_meanwhile_is_not_used(
    bucket: Bucket, model: dict[str, bytes], tmp_path: Path
) -> None:
    """Half of one state and half of the next is neither; the next call brings the new one, alone."""
    bucket.put(model)
    changed = {SHARDS[0]: model[SHARDS[0]][:-4] + b"new!"}
    with pytest.raises(CheckpointError, match="changed while"):
        fetch_plain(bucket.url, tmp_path / "base", lambda *_: bucket.put(changed))
    assert contents(fetch_plain(bucket.url, tmp_path / "base")) == model | changed
    bucket.put(model)
    assert contents(fetch_plain(bucket.url, tmp_path / "base")) == model
    assert len(folders(tmp_path / "base")) == 1


def test_two_that_share_a_folder_fetch_once(
    bucket: Bucket, s3_port: Counting, model: dict[str, bytes], tmp_path: Path
) -> None:
    """As the jobs of several parts do: the second waits for the first."""
    bucket.put(model)
    with ThreadPoolExecutor(2) as both:
        fetched = list(both.map(lambda _: fetch_plain(bucket.url, tmp_path / "base"), range(2)))
    assert fetched[0] == fetched[1]
    assert len(s3_port.reads(SHARDS[1])) == CHUNKS


def test_a_store_that_is_away_may_be_asked_again(
    bucket: Bucket,
    s3_port: Counting,
    model: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No refusal; and once it is back the checkpoint comes."""
    bucket.put(model)
    monkeypatch.setattr(ranged, "WAITS_S", ())
    monkeypatch.setattr(files, "ANSWER_TIMEOUT_S", 1)
    s3_port.cut = True
    with pytest.raises(StoreUnavailable):
        fetch_plain(bucket.url, tmp_path / "base")
    s3_port.cut = False
    assert contents(fetch_plain(bucket.url, tmp_path / "base")) == model


def test_too_little_room_is_said_before_anything_comes(
    bucket: Bucket,
    s3_port: Counting,
    model: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In numbers, and with the folder; more room may be given, so it is no refusal for good."""
    bucket.put(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=CHUNK))
    s3_port.requests.clear()
    with pytest.raises(CheckpointError, match=f"has {CHUNK} left: give it more room") as caught:
        fetch_plain(bucket.url, tmp_path / "base")
    assert not isinstance(caught.value, BaseRefused)
    assert s3_port.reads(SHARDS[1]) == []
