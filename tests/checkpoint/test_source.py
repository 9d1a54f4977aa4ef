"""Bases by hub id: what is fetched, what is refused, and what the message says to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from anamorph.checkpoint import Checkpoint
from anamorph.checkpoint.source import local_base
from anamorph.errors import BaseRefused, CheckpointError

MakeTiny = Callable[..., Path]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "acme-labs/tiny"
LEFT_ALONE = {
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"code",
    "tokenizer.json": b"{}",
    "consolidated.safetensors": b"the same weights once more",
    "onnx/model.safetensors": b"another format",
    "onnx/config.json": b"{}",
}


def at(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    """Where the hub is from now on; ``None``: offline. The library has read its environment at import."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", url is None)
    monkeypatch.setattr(constants, "ENDPOINT", url or "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


def cached(model: Path, cache: Path, *, revision: str = "main") -> Path:
    """Lay ``model`` out as the hub's cache does: blobs, a snapshot of links, a ref."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    for file in model.iterdir():
        blob = repository / "blobs" / sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / revision).write_text(COMMIT)
    return snapshot


class Hub(ThreadingHTTPServer):
    """One repository behind the hub's HTTP interface, on a free port of this machine."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = files
        self.sent: list[str] = []
        self.down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.down:
            self._send(503, b"")
        elif path.startswith(f"/api/models/{NAME}/revision/main"):
            self._send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/api/models/{NAME}/tree/{COMMIT}"):
            self._send(200, json.dumps([self._entry(name) for name in self.server.files]).encode())
        elif (name := path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")) in self.server.files:
            if self.command == "GET":
                self.server.sent.append(name)
            self._send(200, self.server.files[name], ETag=f'"{sha256(self.server.files[name]).hexdigest()}"')
        else:
            self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})

    def _entry(self, name: str) -> dict[str, object]:
        data = self.server.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()[:40]}

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(dict(LEFT_ALONE)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        at(monkeypatch, server.url)
        yield server
        server.shutdown()
        thread.join()


def test_a_folder_is_itself(tmp_path: Path) -> None:
    """A folder that exists is used as it is, even when its name could be a hub id."""
    assert local_base(tmp_path) == tmp_path
    assert local_base(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "base",
    [
        *("/no/such/folder", "./here", "name", "a/b/c", "org/na me", "https://host/org/name"),
        *("hf://org", "hf://org/name/file", "hf://org/name@refs/pr/1", "hf://../name", "hf://org/.."),
        "hf://user:secret@org/name",
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(base: str) -> None:
    """Nothing is looked up on the network for a typing error; the message says how a hub id reads."""
    with pytest.raises(BaseRefused, match="hf://org/name"):
        local_base(base)


@pytest.mark.parametrize(
    "base", [f"hf://{NAME}", NAME, f"hf://{NAME}@v1.0", f"{NAME}@v1.0", f"hf://{NAME}@{COMMIT}"]
)
def test_a_cached_repository_needs_no_network(
    base: str, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By branch, tag or commit: offline, the cache's snapshot is the base, and it opens with its links."""
    model = make_tiny("llama", shard="20KB")
    snapshot = cached(model, tmp_path, revision="v1.0" if base.endswith("v1.0") else "main")
    at(monkeypatch, None)
    assert local_base(base, tmp_path) == snapshot
    assert Checkpoint.open(snapshot).digest() == Checkpoint.open(model).digest()


def test_a_cache_that_lacks_a_shard_is_refused(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted download is no base; the message names the file and the remedy."""
    snapshot = cached(make_tiny("llama", shard="20KB"), tmp_path)
    lost = sorted(snapshot.glob("*.safetensors"))[1]
    lost.unlink()
    at(monkeypatch, None)
    with pytest.raises(CheckpointError, match=f"{lost.name}.*HF_HUB_OFFLINE"):
        local_base(NAME, tmp_path)


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9"])
def test_without_network_and_cache_the_remedy_is_named(
    url: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, or with nobody listening: no refusal for good, and what to do instead."""
    at(monkeypatch, url)
    with pytest.raises(CheckpointError, match="copy the model to a folder") as caught:
        local_base(NAME, tmp_path)
    assert not isinstance(caught.value, BaseRefused)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_only_what_a_fold_reads_is_downloaded(
    hub: Hub, make_tiny: MakeTiny, tmp_path: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configurations, index and its shards; no pickle, no code, no tokenizer, no second copy."""
    model = make_tiny("llama", shard=shard)
    hub.files |= {file.name: file.read_bytes() for file in model.iterdir()}
    fetched = local_base(f"hf://{NAME}", tmp_path / "cache")
    assert sorted(hub.sent) == sorted(file.name for file in model.iterdir())
    assert Checkpoint.open(fetched).digest() == Checkpoint.open(model).digest()
    at(monkeypatch, None)
    assert local_base(f"hf://{NAME}", tmp_path / "cache") == fetched


def test_a_repository_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Pickles alone are no base, and are not even downloaded."""
    hub.files |= {"config.json": b"{}"}
    with pytest.raises(BaseRefused, match="only safetensors"):
        local_base(NAME, tmp_path)
    assert hub.sent == ["config.json"]


def test_what_the_hub_does_not_have_is_refused(hub: Hub, tmp_path: Path) -> None:
    """An unknown repository is a refusal, an ailing hub is not."""
    with pytest.raises(BaseRefused, match="HF_TOKEN"):
        local_base("acme-labs/other", tmp_path)
    hub.down = True
    with pytest.raises(CheckpointError) as caught:
        local_base("acme-labs/other", tmp_path)
    assert not isinstance(caught.value, BaseRefused)


@pytest.mark.parametrize("wish", ["../x.safetensors", "*.safetensors", "pytorch_model.bin"])
def test_an_index_cannot_name_files_elsewhere(hub: Hub, tmp_path: Path, wish: str) -> None:
    """A weight map is not a list of wishes: names with paths or patterns are refused before a download."""
    index = json.dumps({"weight_map": {"a": wish}}).encode()
    hub.files |= {"config.json": b"{}", "model.safetensors.index.json": index}
    with pytest.raises(CheckpointError, match="plain name"):
        local_base(NAME, tmp_path)
    assert set(hub.sent) == {"config.json", "model.safetensors.index.json"}
