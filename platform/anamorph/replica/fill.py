"""Making a folder equal to a replica: right chunks stay, missing and wrong ones are fetched.

The same work brings a new entry, goes on with one that a killed process began, and
repairs one that a disk has damaged. Only checked bytes are ever written, so a file may
be repaired while others read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anamorph.replica.manifest import CHUNK, MANIFEST, ReplicaManifest
from anamorph.replica.ranged import RangedReplica
from anamorph.replica.room import lay_out, opened, writing

THREADS = 8
"""Chunks that are fetched at a time; each is in memory once."""

Progress = Callable[[int, int], None]


def fill(folder: Path, source: RangedReplica, progress: Progress) -> None:
    """Fetch into ``folder`` what of ``source`` it lacks.

    Args:
        folder: exists; what is in it and not in the replica is removed.
        source: the replica, wherever it lies.
        progress: called with the bytes that are right so far, and all bytes.

    Raises:
        ReplicaRefused: the source is not what its manifest says.
        StoreUnavailable: the source does not answer.
        SetupError: the folder cannot be written, as on a full disk.
    """
    manifest = source.manifest
    jobs = [(name, at) for name, file in manifest.files.items() for at in range(len(file.chunks))]
    total, done = sum(manifest.sizes.values()), 0
    with writing(folder):
        lay_out(folder, manifest.sizes)
        _allocate(folder, manifest)
        with ThreadPoolExecutor(THREADS, "anamorph-fetch") as threads:
            try:
                for size in threads.map(lambda job: _bring(folder, source, *job), jobs):
                    done += size
                    progress(done, total)
            finally:
                # After the first error nothing more is begun.
                threads.shutdown(wait=True, cancel_futures=True)
        _write_manifest(folder / MANIFEST, manifest.to_bytes())


def _allocate(folder: Path, manifest: ReplicaManifest) -> None:
    """Take the blocks now: a disk that is too small says so before anything is fetched."""
    for name, entry in manifest.files.items():
        with opened(folder / name) as descriptor:
            if os.fstat(descriptor).st_blocks * 512 < entry.size:
                os.posix_fallocate(descriptor, 0, entry.size)


def _bring(folder: Path, source: RangedReplica, name: str, index: int) -> int:
    """Make one chunk right; returns its bytes."""
    entry = source.manifest.files[name]
    length = min(CHUNK, entry.size - index * CHUNK)
    with opened(folder / name) as descriptor:
        if not entry.matches(index, _pread(descriptor, length, index * CHUNK)):
            pwrite(descriptor, source.chunk(name, index), index * CHUNK)
    return length


def _write_manifest(path: Path, content: bytes) -> None:
    with opened(path) as descriptor:
        if _pread(descriptor, len(content) + 1, 0) != content:
            os.ftruncate(descriptor, 0)
            pwrite(descriptor, content, 0)


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    parts = []
    while length and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


def pwrite(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
