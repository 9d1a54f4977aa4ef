"""Folding in several processes and in parts: the bytes of one process, and what a death leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from anamorph.checkpoint import fold, fold_part, join_parts
from anamorph.checkpoint.work import parted, prepare
from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.errors import CheckpointError, FoldInterrupted, InvalidKey, UnsupportedModel
from anamorph.keys import TenantKey

Make = Callable[..., Path]
SHARD = 20_000


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def workers_of(pid: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(pid).children() if "anamorph.checkpoint.worker" in one.cmdline()]


@contextmanager
def as_soon_as_one_works(act: Callable[[psutil.Process], object], then: Callable[[], bool]) -> Iterator[None]:
    """Do something to a worker of this process once ``then`` holds."""

    def watch() -> None:
        while not (then() and (found := workers_of(os.getpid()))):
            time.sleep(0.005)
        act(found[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("workers", [2, 3, 50])
def test_any_number_of_workers_writes_the_same_bytes(
    workers: int, make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """Every file is the one that a single process writes, and nothing else is left."""
    base = make_tiny("llama", dtype=torch.bfloat16)
    fold(base, tmp_path / "one", key, max_shard_size=SHARD // 2)
    report = fold(base, tmp_path / "out" / "many", key, max_shard_size=SHARD // 2, workers=workers)
    assert contents(tmp_path / "out" / "many") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) > 4
    assert report.resumed == 0
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "many"]
    assert workers_of(os.getpid()) == []


@pytest.mark.slow
def test_smollm2_is_the_same_with_two_workers(key: TenantKey, tmp_path: Path) -> None:
    """The real model, with as many threads as this machine has cores."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    base = fetch_smollm2()
    fold(base, tmp_path / "one", key, max_shard_size=2**25)
    fold(base, tmp_path / "two", key, max_shard_size=2**25, workers=2)
    one, two = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one == two
    for name in one:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_progress_counts_every_byte_of_every_worker(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """It starts at nothing, never goes back, and ends with every byte written."""
    seen: list[tuple[int, int]] = []
    base = make_tiny("llama")
    report = fold(
        base, tmp_path / "r", key, max_shard_size=SHARD, workers=2, progress=lambda *at: seen.append(at)
    )
    assert seen[0] == (0, report.written)
    assert seen[-1] == (report.written, report.written)
    assert seen == sorted(seen)


def test_a_killed_worker_is_named_and_its_work_resumes(
    make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """kill -9 of one worker ends the fold and the other worker; what was finished is taken up."""
    base, out = make_tiny("llama"), tmp_path / "out" / "replica"
    finished = tmp_path / "out" / ".replica.folding" / "replica"
    # One worker is stopped before it can finish, so that the other one surely finishes something.
    stopped: list[psutil.Process] = []

    def stop(worker: psutil.Process) -> None:
        worker.suspend()
        stopped.append(worker)
        while not list(finished.glob("*.safetensors")):
            time.sleep(0.005)
        worker.kill()

    with (
        as_soon_as_one_works(stop, then=lambda: len(workers_of(os.getpid())) == 2),
        pytest.raises(FoldInterrupted, match="SIGKILL"),
    ):
        fold(base, out, key, max_shard_size=SHARD, workers=2)
    assert stopped
    assert not out.exists()
    assert workers_of(os.getpid()) == []
    assert fold(base, out, key, max_shard_size=SHARD, workers=2).resumed > 0
    fold(base, tmp_path / "straight", key, max_shard_size=SHARD)
    assert contents(out) == contents(tmp_path / "straight")


FOLDING = """
import sys
from pathlib import Path
from anamorph.checkpoint import fold
from anamorph.keys import TenantKey
import torch
torch.set_num_threads(1)
if __name__ == "__main__":
    key = TenantKey.from_root(bytes(range(32)), "acme", "tiny", 1)
    fold(Path(sys.argv[1]), Path(sys.argv[2]), key, max_shard_size=20_000, workers=2)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_caller(
    how: signal.Signals, make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """Ctrl-C for the whole group, or kill -9 of the caller: the workers end, and the work resumes."""
    base, out = make_tiny("llama"), tmp_path / "out" / "replica"
    caller = subprocess.Popen(
        [sys.executable, "-c", FOLDING, base, out], start_new_session=True, stderr=subprocess.PIPE
    )
    with caller:
        while len(found := workers_of(caller.pid)) < 2:
            assert caller.poll() is None
            time.sleep(0.005)
        if how is signal.SIGINT:
            os.killpg(caller.pid, how)
        else:
            caller.kill()
        _, err = caller.communicate()
        assert caller.returncode == -how
        assert err.count(b"Traceback") == (how is signal.SIGINT), err.decode()
    gone, alive = psutil.wait_procs(found, timeout=60)
    assert len(gone) == 2
    assert not alive
    assert not out.exists()
    fold(base, out, key, max_shard_size=SHARD, workers=2)
    fold(base, tmp_path / "straight", key, max_shard_size=SHARD)
    assert contents(out) == contents(tmp_path / "straight")


def test_a_workers_error_is_raised_and_leaves_nothing(
    make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """A worker that cannot go on says why, in the class and the words that one process would use."""
    base, parent = make_tiny("llama"), tmp_path / "out"
    told: list[int] = []

    def change(done: int, _total: int) -> None:
        # The first call comes before any worker starts: the base is another one by then.
        if not told:
            (base / "config.json").write_text('{"model_type": "unknown"}')
        told.append(done)

    with pytest.raises(UnsupportedModel):
        fold(base, parent / "replica", key, max_shard_size=SHARD, workers=2, progress=change)
    assert list(parent.iterdir()) == []


def test_the_key_is_in_no_argument_environment_or_file(
    make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """What the kernel shows of a worker, and all that lies in the fold's folder, holds no root."""
    base, seen = make_tiny("llama"), []

    def look(worker: psutil.Process) -> None:
        proc = Path(f"/proc/{worker.pid}")
        worker.suspend()
        seen.append((proc / "cmdline").read_bytes() + (proc / "environ").read_bytes())
        seen.extend(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        worker.resume()

    with as_soon_as_one_works(look, then=lambda: True):
        fold(base, tmp_path / "replica", key, max_shard_size=SHARD, workers=2)
    root = bytes(range(32))
    assert seen
    assert not any(root in one or root.hex().encode() in one or b"AAECAwQF" in one for one in seen)


def test_a_key_is_handed_over_through_a_pipe_only(key: TenantKey, tmp_path: Path) -> None:
    """A file, even one that is deleted at once, is refused; through a pipe the same key comes out."""
    with (tmp_path / "file").open("wb") as file, pytest.raises(InvalidKey, match="pipe"):
        key.hand_over(file.fileno())
    assert (tmp_path / "file").read_bytes() == b""
    receive, send = os.pipe()
    key.hand_over(send)
    os.close(send)
    assert TenantKey.take_over(receive) == key


def test_parts_make_what_one_fold_makes(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """All parts, in any order and one of them twice, and ``fold`` publishes the bytes of one process."""
    base, out = make_tiny("llama"), tmp_path / "out" / "replica"
    written = [fold_part(base, out, key, index=index, of=3, max_shard_size=SHARD) for index in (2, 0, 1, 0)]
    assert min(written[:3]) > 0
    assert written[3] == 0
    assert not out.exists()
    assert fold(base, out, key, max_shard_size=SHARD).resumed == sum(written)
    fold(base, tmp_path / "straight", key, max_shard_size=SHARD)
    assert contents(out) == contents(tmp_path / "straight")
    assert list(out.parent.iterdir()) == [out]


def test_a_missing_part_is_made_at_the_end(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """``fold`` takes up the parts there are and makes the rest."""
    base, out = make_tiny("llama"), tmp_path / "replica"
    written = fold_part(base, out, key, index=0, of=2, max_shard_size=SHARD)
    assert fold(base, out, key, max_shard_size=SHARD, workers=2).resumed == written
    fold(base, tmp_path / "straight", key, max_shard_size=SHARD)
    assert contents(out) == contents(tmp_path / "straight")


def test_parts_of_another_fold_are_refused(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Parts under two keys, or of two layouts, never meet in one folder."""
    base, out = make_tiny("llama"), tmp_path / "replica"
    fold_part(base, out, key, index=0, of=2, max_shard_size=SHARD)
    other = TenantKey.from_root(bytes(32), "acme", "tiny", 1)
    with pytest.raises(CheckpointError, match="another fold"):
        fold_part(base, out, other, index=1, of=2, max_shard_size=SHARD)
    with pytest.raises(CheckpointError, match="another fold"):
        fold_part(base, out, key, index=1, of=2, max_shard_size=SHARD // 2)


def test_joined_parts_are_what_one_fold_makes(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Without one of them nothing is published and it is named; with all, the bytes of one process."""
    base, out = make_tiny("llama"), tmp_path / "out" / "replica"
    with pytest.raises(FoldInterrupted, match="part 0 of 2 is not made"):
        join_parts(base, out, key, of=2, max_shard_size=SHARD)
    written = fold_part(base, out, key, index=0, of=2, max_shard_size=SHARD)
    with pytest.raises(FoldInterrupted, match="part 1 of 2 is not made"):
        join_parts(base, out, key, of=2, max_shard_size=SHARD)
    assert fold_part(base, out, key, index=0, of=2, max_shard_size=SHARD) == 0
    written += fold_part(base, out, key, index=1, of=2, max_shard_size=SHARD)
    assert join_parts(base, out, key, of=2, max_shard_size=SHARD).resumed == written
    fold(base, tmp_path / "straight", key, max_shard_size=SHARD)
    assert contents(out) == contents(tmp_path / "straight")
    assert list(out.parent.iterdir()) == [out]


def test_parts_of_another_key_are_not_joined(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """They are refused by name and stay; so they do when finishing fails."""
    base, out = make_tiny("llama"), tmp_path / "replica"
    fold_part(base, out, key, index=0, of=1, max_shard_size=SHARD)
    other = TenantKey.from_root(bytes(32), "acme", "tiny", 1)
    with pytest.raises(CheckpointError, match="another fold"):
        join_parts(base, out, other, of=1, max_shard_size=SHARD)

    def fail(_folder: Path, _report: object) -> None:
        raise OSError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        join_parts(base, out, key, of=1, max_shard_size=SHARD, finish=fail)
    assert not out.exists()
    assert join_parts(base, out, key, of=1, max_shard_size=SHARD).resumed > 1


def test_nothing_is_finished_while_a_part_is_made(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """``fold`` is refused until the parts are through; parts do not hinder each other."""
    base, out = make_tiny("llama"), tmp_path / "replica"
    met: list[int] = []

    def meanwhile(_done: int, _total: int) -> None:
        if not met:
            met.append(1)
            with pytest.raises(CheckpointError, match="another process"):
                fold(base, out, key, max_shard_size=SHARD)
            fold_part(base, out, key, index=1, of=2, max_shard_size=SHARD)

    fold_part(base, out, key, index=0, of=2, max_shard_size=SHARD, progress=meanwhile)
    assert fold(base, out, key, max_shard_size=SHARD).resumed > 1


def test_one_file_has_one_writer(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """A part that runs twice at the same time is told so, and the first one's bytes stay."""
    base, out, shard = make_tiny("llama"), tmp_path / "replica", 2**30
    met: list[int] = []

    def meanwhile(done: int, total: int) -> None:
        if total / 2 < done < total and not met:
            met.append(done)
            with pytest.raises(CheckpointError, match="another process"):
                fold_part(base, out, key, index=0, of=1, max_shard_size=shard)

    fold_part(base, out, key, index=0, of=1, max_shard_size=shard, progress=meanwhile)
    assert met
    fold(base, out, key, max_shard_size=shard)
    fold(base, tmp_path / "straight", key, max_shard_size=shard)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("of", [1, 2, 7, 100])
def test_every_file_is_in_one_part(of: int, make_tiny: Make, key: TenantKey) -> None:
    """Whatever the number of parts, and the same at every call."""
    shards = prepare(make_tiny("llama"), key, "rotate", SHARD).shards
    parts = parted(shards, of)
    assert len(parts) == of
    assert sorted(shard.name for part in parts for shard in part) == sorted(shard.name for shard in shards)
    assert parts == parted(shards, of)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_part_out_of_range_is_an_error(index: int, key: TenantKey, tmp_path: Path) -> None:
    """Parts are counted from 0."""
    with pytest.raises(ValueError, match="index"):
        fold_part(tmp_path, tmp_path / "r", key, index=index, of=2)
