"""Bases by hub id on the command line, from a cache laid out as the hub's library lays it out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from anamorph.keys import TenantKey
from anamorph.wire.states import State

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFERENCE = "hf://acme-labs/tiny"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cached")]

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def cached(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as a snapshot of ``acme-labs/tiny``, and no network: blobs, links and a ref."""
    home = tmp_path / "hf"
    repository = home / "hub" / "models--acme-labs--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return snapshot


def test_fold_takes_a_hub_id(anamorph: Run, base: Path, tmp_path: Path) -> None:
    """The replica of a repository is, byte for byte, the replica of the folder that it holds."""
    key = tmp_path / "key"
    TenantKey.from_root(bytes(range(32)), "acme", "tiny", 1).save(key)
    for source, out in ((REFERENCE, "of-hub"), (base, "of-folder")):
        done = anamorph("fold", source, tmp_path / out, "--key", key)
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "of-folder").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "of-hub").iterdir())
    for name in files:
        assert (tmp_path / "of-hub" / name).read_bytes() == (tmp_path / "of-folder" / name).read_bytes()


def test_a_hub_id_that_is_not_cached_says_what_to_do(anamorph: Run, tmp_path: Path) -> None:
    """One line with the remedy, and nothing was written."""
    key = tmp_path / "key"
    TenantKey.from_root(bytes(range(32)), "acme", "tiny", 1).save(key)
    done = anamorph("fold", "acme-labs/other", tmp_path / "out", "--key", key)
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr
    assert not (tmp_path / "out").exists()


def job(anamorph: Run, order: dict[str, Any]) -> CompletedProcess[str]:
    return anamorph("materialize", stdin=json.dumps(order))


@pytest.mark.real
def test_a_job_takes_an_allowed_hub_id(anamorph: Run, materializing: Any) -> None:
    """``--allow-base hf://org/`` lets the operator's job make a replica of a repository of it."""
    order = materializing.order(base=REFERENCE, allow_base=["hf://acme-labs/"])
    done = job(anamorph, order)
    assert done.returncode == 0, done.stderr
    assert materializing.version.state is State.STAGED


@pytest.mark.real
def test_a_job_refuses_another_organisation(anamorph: Run, materializing: Any) -> None:
    """Cached or not: exit 3, FAILED, and the root was never asked for."""
    done = job(anamorph, materializing.order(base=REFERENCE, allow_base=["hf://acme/", "/"]))
    assert done.returncode == 3
    assert materializing.version.state is State.FAILED
    assert not any("release" in action for action in materializing.audit())


@pytest.mark.real
def test_a_job_without_the_hub_may_be_tried_again(anamorph: Run, materializing: Any) -> None:
    """Exit 1: the version still waits, and the root was not released for a download that cannot be."""
    done = job(anamorph, materializing.order(base="hf://acme-labs/other", allow_base=["hf://acme-labs/"]))
    assert done.returncode == 1
    assert materializing.version.state is State.MATERIALIZING
    assert not any("release" in action for action in materializing.audit())
