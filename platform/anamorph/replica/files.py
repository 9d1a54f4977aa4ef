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

from anamorph.errors import AnamorphError, ReplicaRefused, StoreUnavailable
from anamorph.replica.location import local_path, remote_path
from anamorph.replica.manifest import CHUNK, MANIFEST, is_replica_file

ANSWER_TIMEOUT_S = 30.0
"""Longest wait for one answer of an object store: a listing, or 4 MiB."""


class Folder(Protocol):
    """A flat folder that may be a replica."""

    def names(self) -> list[str]:
        """Sorted names of everything in it; refuses what is not a plain allowed file."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """The file's content in pieces of 4 MiB, the last one shorter."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of one file; fewer where it ends before."""


@contextlib.contextmanager
def open_folder(location: str | os.PathLike[str]) -> Iterator[Folder]:
    """Open a path or URL for reading as a replica.

    Raises:
        ReplicaRefused: there is no such folder, or it cannot be read.
        StoreUnavailable: the object store does not answer.
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


@contextlib.contextmanager
def _reading_store() -> Iterator[None]:
    """What is missing or forbidden is no replica; anything else that a store says may be over in a minute."""
    try:
        yield
    except AnamorphError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        reason = error.strerror or type(error).__name__
        raise ReplicaRefused(f"the replica cannot be read: {reason}") from error
    except Exception as error:  # noqa: BLE001 - file systems have errors of their own, few of them OSError
        # Without the cause: its text may quote a signed URL.
        raise StoreUnavailable(f"the replica store does not answer: {type(error).__name__}") from None


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
        with self._open(name) as file:
            before = os.fstat(file.fileno())
            while chunk := _read_chunk(file):
                yield chunk
            if _state(os.fstat(file.fileno())) != _state(before):
                raise ReplicaRefused(f"{name} changed while it was read")

    def read(self, name: str, start: int, stop: int) -> bytes:
        with self._open(name) as file:
            file.seek(start)
            return _read_up_to(file, stop - start)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        check_name(name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with _reading(), os.fdopen(os.open(name, flags, dir_fd=self._descriptor), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ReplicaRefused(f"{name} is not a plain file")
            yield file


class RemoteFolder:
    """A prefix of an fsspec file system, such as ``s3://bucket/tenant/model/v1``."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._fs = filesystem
        self._path = path.rstrip("/")

    def names(self) -> list[str]:
        # The listing must not come from fsspec's cache: another process may have published since.
        self._fs.invalidate_cache()
        with _reading_store():
            found = sorted(ask(self._fs, "ls", self._path, detail=True), key=lambda entry: str(entry["name"]))
        names = [str(entry["name"]).rsplit("/", 1)[-1] for entry in found]
        for name, entry in zip(names, found, strict=True):
            check_name(name)
            if entry["type"] != "file":
                raise ReplicaRefused(f"{name} is a folder, not a plain file")
        return names

    def chunks(self, name: str) -> Iterator[bytes]:
        check_name(name)
        with _reading_store():
            size = int(ask(self._fs, "info", f"{self._path}/{name}")["size"])
        for start in range(0, size, CHUNK):
            yield self.read(name, start, min(start + CHUNK, size))

    def read(self, name: str, start: int, stop: int) -> bytes:
        check_name(name)
        with _reading_store():
            return bytes(ask(self._fs, "cat_file", f"{self._path}/{name}", start=start, end=stop))


def ask(filesystem: Any, method: str, *args: Any, **options: Any) -> Any:
    """What a method of an fsspec file system answers, waited for no longer than ``ANSWER_TIMEOUT_S``."""
    from fsspec.asyn import sync

    if not filesystem.async_impl:
        return getattr(filesystem, method)(*args, **options)
    # Not through the synchronous twin, which would wait for ever.
    asked = getattr(filesystem, f"_{method}")
    return sync(filesystem.loop, asked, *args, timeout=ANSWER_TIMEOUT_S, **options)


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
    """Exactly one chunk, or what is left."""
    return _read_up_to(file, CHUNK)


def _read_up_to(file: Any, missing: int) -> bytes:
    """Exactly so many bytes, or what is left: raw reads may return less than was asked for."""
    parts = []
    while missing and (part := file.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
