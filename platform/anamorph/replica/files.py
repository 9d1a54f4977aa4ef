"""Reading a replica's files, in 4 MiB chunks, from a local folder or an object store.

Local files are opened relative to one directory descriptor and never through a
link, and are checked to be the same file after the last byte as before the first.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from anamorph.errors import ReplicaRefused
from anamorph.replica.location import local_path, remote_path
from anamorph.replica.manifest import CHUNK, MANIFEST, is_replica_file


class Folder(Protocol):
    """A flat folder that may be a replica."""

    def names(self) -> list[str]:
        """Sorted names of everything in it; refuses what is not a plain allowed file."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """The file's content in pieces of 4 MiB, the last one shorter."""


@contextlib.contextmanager
def open_folder(location: str | os.PathLike[str]) -> Iterator[Folder]:
    """Open a path or URL for reading as a replica.

    Raises:
        ReplicaRefused: there is no such folder, or it cannot be read.
    """
    path = local_path(location)
    if path is None:
        yield RemoteFolder(*remote_path(str(location)))
        return
    with LocalFolder.open(path) as folder:
        yield folder


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What cannot be read is no replica: a missing folder, a lost file, a broken disk."""
    try:
        yield
    except OSError as error:
        raise ReplicaRefused(
            f"the replica cannot be read: {error.strerror or type(error).__name__}"
        ) from error


class LocalFolder:
    """A folder held open by descriptor, so that renaming its path changes nothing under the reader."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[LocalFolder]:
        with _reading():
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield cls(descriptor)
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        with _reading(), os.scandir(self._descriptor) as entries:
            found = sorted((entry.name, entry.is_file(follow_symlinks=False)) for entry in entries)
        for name, plain in found:
            check_name(name)
            if not plain:
                raise ReplicaRefused(f"{name} is a link or a folder, not a plain file")
        return [name for name, _ in found]

    def chunks(self, name: str) -> Iterator[bytes]:
        check_name(name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with _reading(), os.fdopen(os.open(name, flags, dir_fd=self._descriptor), "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise ReplicaRefused(f"{name} is not a plain file")
            while chunk := _read_chunk(file):
                yield chunk
            if _state(os.fstat(file.fileno())) != _state(before):
                raise ReplicaRefused(f"{name} changed while it was read")


class RemoteFolder:
    """A prefix of an fsspec file system, such as ``s3://bucket/tenant/model/v1``."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._fs = filesystem
        self._path = path.rstrip("/")

    def names(self) -> list[str]:
        # The listing must not come from fsspec's cache: another process may have published since.
        self._fs.invalidate_cache()
        with _reading():
            found = sorted(self._fs.ls(self._path, detail=True), key=lambda entry: str(entry["name"]))
        names = [str(entry["name"]).rsplit("/", 1)[-1] for entry in found]
        for name, entry in zip(names, found, strict=True):
            check_name(name)
            if entry["type"] != "file":
                raise ReplicaRefused(f"{name} is a folder, not a plain file")
        return names

    def chunks(self, name: str) -> Iterator[bytes]:
        check_name(name)
        with _reading(), self._fs.open(f"{self._path}/{name}", "rb", block_size=CHUNK) as file:
            while chunk := _read_chunk(file):
                yield chunk


def check_name(name: str) -> None:
    """Refuse a name that no replica holds: tokenizers, pickles, code, anything with a path in it."""
    if name != MANIFEST and not is_replica_file(name):
        raise ReplicaRefused(
            f"a replica holds no {name!r}: tokenizers, pickles, code and folders are refused"
        )


def read_small(folder: Folder, name: str, limit: int) -> bytes:
    """One small file as a whole.

    Raises:
        ReplicaRefused: it is longer than ``limit`` bytes.
    """
    return join_small(name, folder.chunks(name), limit)


def join_small(name: str, chunks: Iterable[bytes], limit: int) -> bytes:
    """Put the chunks of one small file together, stopping as soon as they exceed ``limit`` bytes."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limit:
            raise ReplicaRefused(f"{name} is longer than {limit} bytes")
    return bytes(data)


def _read_chunk(file: Any) -> bytes:
    """Exactly one chunk, or what is left: raw reads may return less than was asked for."""
    parts = []
    missing = CHUNK
    while missing and (part := file.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
