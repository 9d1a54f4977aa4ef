"""Plaintext checkpoints in an object store: what is read of them, brought to a folder of this machine.

Nothing vouches for these files: whoever may write the prefix decides what they are, and a
base that must be one and no other is named by its digest. A base appears whole or not at all,
and a killed fetch goes on from the bytes that are there, as long as the store still lists the
same objects.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anamorph.errors import CheckpointError
from anamorph.replica.fill import THREADS, Progress, pwrite
from anamorph.replica.locks import locked
from anamorph.replica.manifest import CHUNK
from anamorph.replica.ranged import patiently
from anamorph.replica.room import opened
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
    place = into / source.state(wanted)
    if not place.exists():
        partial = place.with_name(f"{place.name}.partial")
        _clear(into, keep=partial)
        partial.mkdir(mode=0o700, exist_ok=True)
        _check_room(source.url, partial, wanted)
        fill_plain(partial, source, wanted, progress, resume=True)
        partial.rename(place)
    return place


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


def fill_plain(
    folder: Path, source: StoredCheckpoint, wanted: Listing, progress: Progress, *, resume: bool
) -> None:
    """Fetch files of a checkpoint into ``folder``.

    Args:
        folder: exists.
        source: where they lie.
        wanted: what ``source`` has listed.
        progress: called with bytes that are here, and bytes in all.
        resume: whether what is there has come from the same objects, from the beginning of each file on.

    Raises:
        CheckpointError: the objects are no longer those of ``wanted``.
        BaseRefused, StoreUnavailable: as ``StoredCheckpoint.read``.
        OSError: the folder cannot be written.
    """
    total, done = sum(one.size for one in wanted.values()), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    with ThreadPoolExecutor(THREADS, "anamorph-fetch") as threads:
        for name, stored in wanted.items():
            with opened(folder / name) as descriptor:
                begin = min(os.fstat(descriptor).st_size, stored.size) if resume else 0
                count(begin)
                for data, at in _chunks(source, name, begin, stored.size, threads):
                    pwrite(descriptor, data, at)
                    count(len(data))
                os.fsync(descriptor)
    if source.wanted() != wanted:
        raise CheckpointError(f"{source.url} changed while it was fetched; it is fetched anew next time")


def _chunks(
    source: StoredCheckpoint, name: str, begin: int, size: int, threads: ThreadPoolExecutor
) -> Iterator[tuple[bytes, int]]:
    """A file's bytes from ``begin`` on, in order; a few chunks at a time, so that memory stays bounded."""
    starts = range(begin, size, CHUNK)
    for first in range(0, len(starts), THREADS):
        window = starts[first : first + THREADS]
        read = threads.map(lambda at: _read(source, name, at, min(at + CHUNK, size)), window)
        yield from zip(read, window, strict=True)


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
