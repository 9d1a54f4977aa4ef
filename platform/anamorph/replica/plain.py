"""Plaintext checkpoints in an object store: what is read of them, brought to a folder of this machine.

Nothing vouches for these files: whoever may write the prefix decides what they are, and a
base that must be one and no other is named by its digest. So this never touches the cache
of replicas. A checkpoint appears whole or not at all, and a killed fetch goes on from the
bytes that are there, as long as the store still lists the same objects.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anamorph.errors import CheckpointError
from anamorph.replica.fill import THREADS, Progress
from anamorph.replica.locks import locked
from anamorph.replica.manifest import CHUNK
from anamorph.replica.ranged import patiently
from anamorph.replica.stored import Listing, StoredCheckpoint


def fetch_plain(url: str, into: Path, progress: Progress = lambda _done, _total: None) -> Path:
    """Bring what is read of the checkpoint at ``url`` to a folder below ``into``; return that folder.

    These are configurations, and the safetensors files: tokenizers, pickles and code stay where
    they are. Of several processes that share ``into`` one fetches, and the others wait for it.

    Args:
        url: of the checkpoint's folder, such as ``s3://bucket/path``.
        into: made if need be; what it holds of another state of the checkpoint is removed.
        progress: called with bytes that are here, and bytes in all.

    Raises:
        BaseRefused: no checkpoint there, one that lacks a file, or none that may be read.
        CheckpointError: it changed meanwhile, or cannot be written.
        StoreUnavailable: the store does not answer, after a few tries.
        SetupError: the package for this kind of store is not installed.
    """
    source = StoredCheckpoint(url)
    with _writing(into):
        into.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(into / "lock"):
            return _fetched(source, into, progress)


def _fetched(source: StoredCheckpoint, into: Path, progress: Progress) -> Path:
    wanted = source.wanted()
    place = into / _name_of(source.url, wanted)
    if not place.exists():
        partial = place.with_name(f"{place.name}.partial")
        _clear(into, keep=partial)
        partial.mkdir(mode=0o700, exist_ok=True)
        _check_room(source.url, partial, wanted)
        _fill(source, wanted, partial, progress)
        if source.wanted() != wanted:
            raise CheckpointError(f"{source.url} changed while it was fetched; it is fetched anew next time")
        partial.rename(place)
    return place


def _name_of(url: str, wanted: Listing) -> str:
    """A name for this state of the checkpoint."""
    lines = [url, *(f"{name} {one.size} {one.mark}" for name, one in wanted.items())]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()[:32]


def _clear(into: Path, keep: Path) -> None:
    """Remove other states of the checkpoint: each is as big as a model."""
    for path in into.iterdir():
        if path != keep and path.is_dir():
            shutil.rmtree(path)


def _check_room(url: str, partial: Path, wanted: Listing) -> None:
    here = sum(path.stat().st_size for path in partial.iterdir())
    need, free = sum(one.size for one in wanted.values()) - here, shutil.disk_usage(partial).free
    if need > free:
        raise CheckpointError(
            f"{url} takes {need} bytes more, and {partial.parent} has {free} left: give it more room"
        )


def _fill(source: StoredCheckpoint, wanted: Listing, folder: Path, progress: Progress) -> None:
    total, done = sum(one.size for one in wanted.values()), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    with ThreadPoolExecutor(THREADS, "anamorph-fetch") as threads:
        for name, stored in wanted.items():
            _bring(source, name, stored.size, folder / name, threads, count)


def _bring(
    source: StoredCheckpoint,
    name: str,
    size: int,
    path: Path,
    threads: ThreadPoolExecutor,
    count: Callable[[int], None],
) -> None:
    """Append to one file what it lacks, a few chunks at a time so that memory stays bounded."""
    if path.exists() and path.stat().st_size > size:
        path.unlink()
    with path.open("ab") as file:
        starts = range(file.tell(), size, CHUNK)
        count(file.tell())
        for first in range(0, len(starts), THREADS):
            window = starts[first : first + THREADS]
            for data in threads.map(lambda at: _read(source, name, at, min(at + CHUNK, size)), window):
                file.write(data)
                count(len(data))
        file.flush()
        os.fsync(file.fileno())


def _read(source: StoredCheckpoint, name: str, start: int, stop: int) -> bytes:
    return patiently(lambda: source.read(name, start, stop))


@contextlib.contextmanager
def _writing(into: Path) -> Iterator[None]:
    """What the disk refuses, said in words."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the base to {into}: {error.strerror or type(error).__name__}"
        ) from error
