"""``anamorph fold`` and ``anamorph replica verify``: from two files to a yes or a no."""

from __future__ import annotations

import json
import shutil
from base64 import b64encode
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from anamorph.cli.main import app
from anamorph.keys import TenantKey


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "key.json"
    TenantKey.from_root(bytes(range(32)), "acme", "chat", 1).save(path)
    return path


@pytest.fixture(scope="module")
def pristine(base: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replicas") / "out"
    result = call("fold", base, out, "--key", key_file, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["key_id"] == TenantKey.load(key_file).id
    return out


@pytest.fixture
def anchor(key_file: Path) -> str:
    return b64encode(TenantKey.load(key_file).public_key()).decode()


@pytest.fixture
def replica(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "replica"))


def test_a_folded_replica_verifies(replica: Path, anchor: str, key_file: Path) -> None:
    """Exit 0, and the answer says whose replica it is."""
    result = call("replica", "verify", replica, "--public-key", anchor, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert (answer["verified"], answer["key_id"]) == (True, TenantKey.load(key_file).id)


def test_without_an_anchor_the_answer_is_never_yes(replica: Path) -> None:
    """A perfect replica without ``--public-key`` is exit 2 and "not verified"."""
    result = call("replica", "verify", replica)
    assert result.exit_code == 2
    assert "not verified" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["anamorph.json", "config.json", "model.safetensors"])
def test_a_flipped_byte_is_exit_1(replica: Path, anchor: str, name: str) -> None:
    """One line of error, no traceback, nothing on standard output."""
    data = bytearray((replica / name).read_bytes())
    data[len(data) // 2] ^= 1
    (replica / name).write_bytes(data)
    result = call("replica", "verify", replica, "--public-key", anchor)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_another_anchor_is_exit_1(replica: Path) -> None:
    """A replica that is right under one key is wrong under every other."""
    other = b64encode(TenantKey.from_root(b"o" * 32, "acme", "chat", 1).public_key()).decode()
    assert call("replica", "verify", replica, "--public-key", other).exit_code == 1


@pytest.mark.parametrize("text", ["", "AAAA", "no base64!"])
def test_what_is_no_key_is_exit_1(replica: Path, text: str) -> None:
    """A mistyped anchor is an error, not a missing one."""
    assert call("replica", "verify", replica, "--public-key", text).exit_code == 1


def test_pins_are_checked(replica: Path, anchor: str) -> None:
    """Key id and manifest digest can be demanded."""
    check = ("replica", "verify", replica, "--public-key", anchor)
    digest = json.loads(call(*check, "--json").stdout)["manifest_sha256"]
    assert call(*check, "--manifest-sha256", digest).exit_code == 0
    assert call(*check, "--manifest-sha256", "0" * 64).exit_code == 1
    assert call(*check, "--key-id", "acme.chat.v2.0011223344556677").exit_code == 1


@pytest.mark.parametrize(("size", "sharded"), [("1KB", True), ("1000", True), ("1MiB", False)])
def test_shards_have_the_size_that_was_asked_for(
    base: Path, key_file: Path, tmp_path: Path, size: str, sharded: bool
) -> None:
    """Sizes are read with and without a unit."""
    out = tmp_path / "out"
    assert call("fold", base, out, "--key", key_file, "--max-shard-size", size).exit_code == 0
    assert (len(list(out.glob("*.safetensors"))) > 1) == sharded


def test_workers_make_the_same_replica(base: Path, key_file: Path, tmp_path: Path) -> None:
    """Two processes, one manifest: every byte is the same."""
    made = []
    for workers in ("1", "2"):
        options = ("--key", key_file, "--max-shard-size", "20KB", "--workers", workers, "--json")
        result = call("fold", base, tmp_path / workers, *options)
        assert result.exit_code == 0, result.output
        made.append(json.loads(result.stdout)["manifest_sha256"])
    assert made[0] == made[1]
    assert len(list((tmp_path / "2").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    "options",
    [("--profile", "mirror"), ("--max-shard-size", "lots"), ("--max-shard-size", "0"), ("--workers", "0")],
)
def test_a_bad_option_is_wrong_usage(
    base: Path, key_file: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    """Exit 2, and nothing is made."""
    assert call("fold", base, tmp_path / "out", "--key", key_file, *options).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_exit_1(base: Path, key_file: Path, replica: Path) -> None:
    """Folding onto a replica is refused in one line."""
    result = call("fold", base, replica, "--key", key_file)
    assert result.exit_code == 1
    assert "never overwritten" in result.stderr


def test_a_base_that_is_none_is_exit_1(key_file: Path, tmp_path: Path) -> None:
    """A folder without a checkpoint is an error in one line."""
    result = call("fold", tmp_path, tmp_path / "out", "--key", key_file)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
