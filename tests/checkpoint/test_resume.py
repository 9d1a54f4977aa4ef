"""A fold that fails, is killed or meets another one: nothing half-made ever has the replica's name."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anamorph.checkpoint import FoldReport, fold
from anamorph.checkpoint.staging import staged
from anamorph.errors import CheckpointError, ReplicaExists
from anamorph.keys import TenantKey

Make = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from anamorph.checkpoint import fold
from anamorph.keys import TenantKey
torch.set_num_threads(1)
base, out, part = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def progress(done, total):
    if done > part * total:
        os.kill(os.getpid(), signal.SIGKILL)
key = TenantKey.from_root(bytes(range(32)), "acme", "tiny", 1)
fold(base, out, key, max_shard_size=20_000, progress=progress)
"""


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_killed_fold_resumes_to_the_same_bytes(
    part: float, make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """kill -9 leaves nothing under the replica's name; the next fold takes up finished shards."""
    base, out = make_tiny("llama"), tmp_path / "out" / "replica"
    killed = subprocess.run([sys.executable, "-c", KILLED, base, out, str(part)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not list(tmp_path.glob("out/**/config.json"))
    finished = len(list(tmp_path.glob("out/.replica.folding/replica/*.safetensors")))
    report = fold(base, out, key, max_shard_size=20_000)
    assert report.resumed == finished
    fold(base, tmp_path / "straight", key, max_shard_size=20_000)
    assert contents(out) == contents(tmp_path / "straight")
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("change", ["base", "key", "profile", "shards"])
def test_another_fold_never_takes_up_foreign_shards(
    change: str, make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """Left-over shards of another base, key, profile or layout are thrown away."""
    base, out = make_tiny("llama"), tmp_path / "out" / "replica"
    subprocess.run([sys.executable, "-c", KILLED, base, out, "0.5"], check=False)
    if change == "base":
        base = make_tiny("llama", seed=1)
    other = TenantKey.from_root(bytes(32), "acme", "tiny", 1) if change == "key" else key
    size = 12_000 if change == "shards" else 20_000
    profile = "permute" if change == "profile" else "rotate"
    report = fold(base, out, other, profile, max_shard_size=size)  # type: ignore[arg-type]
    assert report.resumed == 0
    fold(base, tmp_path / "straight", other, profile, max_shard_size=size)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "straight")


def test_an_interrupt_leaves_work_to_resume(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Ctrl-C is a kill with manners: finished shards are taken up the next time."""
    base, out = make_tiny("llama"), tmp_path / "out" / "replica"

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(base, out, key, max_shard_size=20_000, progress=interrupt)
    assert not out.exists()
    assert fold(base, out, key, max_shard_size=20_000).resumed > 0


def test_a_full_disk_leaves_nothing(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """When a file cannot grow, the fold fails by name and removes what it began."""
    base, parent = make_tiny("llama"), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            fold(base, parent / "replica", key)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(parent.iterdir()) == []


def test_one_fold_at_a_time(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """A second fold into the same place is refused while the first one runs, and harms nothing."""
    base, out = make_tiny("llama"), tmp_path / "replica"

    def finish(folder: Path, report: FoldReport) -> None:
        with pytest.raises(CheckpointError, match="another process"):
            fold(base, out, key)
        assert folder.exists()
        assert report.resumed == 0

    fold(base, out, key, finish=finish)
    assert out.exists()


def test_a_place_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """If something appears under the name while a fold runs, it stays as it is."""
    out = tmp_path / "replica"

    def build() -> None:
        with staged(out, "binding") as folder:
            (folder / "config.json").write_text("{}")
            out.mkdir()

    with pytest.raises(ReplicaExists):
        build()
    assert list(out.iterdir()) == []
