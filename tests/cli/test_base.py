"""``anamorph base``: what it says of a checkpoint, and its way into a real S3-compatible server."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from tests.servers.s3 import BUCKET, Server

from anamorph.checkpoint import Checkpoint
from anamorph.client.tokenizer import chat_template_digest, tokenizer_digest

Run = Callable[..., CompletedProcess[str]]

TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def url(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer, and with what is never pushed."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def test_show_says_what_a_record_needs(anamorph: Run, model: Path) -> None:
    """The digest is a fold's, the others are the proxy's."""
    done = anamorph("base", "show", model, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "digest": Checkpoint.open(model).digest(),
        "vocab_size": 64,
        "context_length": 64,
        "tokenizer_digest": tokenizer_digest(model),
        "chat_template_digest": chat_template_digest(model),
    }


def test_show_leaves_out_what_is_not_there(anamorph: Run, base: Path) -> None:
    """No tokenizer, no digest of one."""
    done = anamorph("base", "show", base, "--json")
    assert set(json.loads(done.stdout)) == {"digest", "vocab_size", "context_length"}


def test_no_checkpoint_is_an_error(anamorph: Run, tmp_path: Path) -> None:
    """In one line, without a traceback."""
    done = anamorph("base", "show", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.real
@pytest.mark.slow
def test_push_copies_what_a_fold_reads(anamorph: Run, model: Path, url: str, s3_server: Server) -> None:
    """Those files whole, and neither tokenizer nor pickle; a second push is refused and changes nothing."""
    done = anamorph("base", "push", model, f"{url}/", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["uri"], shown["digest"]) == (url, Checkpoint.open(model).digest())
    there = {
        path.rpartition("/")[2]: s3_server.client().cat_file(path) for path in s3_server.client().ls(url)
    }
    assert there == {name: (model / name).read_bytes() for name in Checkpoint.open(model).files}

    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    again = anamorph("base", "push", model, url)
    assert again.returncode == 1
    assert "holds a checkpoint already" in again.stderr
    assert s3_server.client().cat_file(f"{url}/config.json") == there["config.json"]


@pytest.mark.real
@pytest.mark.slow
def test_a_push_that_was_killed_is_done_anew(anamorph: Run, model: Path, url: str, s3_server: Server) -> None:
    """Without ``config.json`` the folder is nobody's base yet."""
    s3_server.client().pipe_file(f"{url}/model.safetensors", b"half")
    assert anamorph("base", "push", model, url).returncode == 0
    weights = s3_server.client().cat_file(f"{url}/model.safetensors")
    assert weights == (model / "model.safetensors").read_bytes()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the store refuses to write"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "the store does not answer"),
    ],
)
def test_a_store_that_refuses(
    anamorph: Run,
    model: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    says: str,
) -> None:
    """What is wrong is said in one line, without what the store answered."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = anamorph("base", "push", model, url)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "where", ["/models/smol", "s3://user:secret@bucket/x", "ftp://bucket/x", "s3://bucket"]
)
def test_only_a_folder_of_a_store(anamorph: Run, model: Path, where: str) -> None:
    """And the message does not repeat what may hold a password."""
    done = anamorph("base", "push", model, where)
    assert done.returncode == 1
    assert "where to push to reads s3://bucket/path" in done.stderr
    assert "secret" not in done.stderr
