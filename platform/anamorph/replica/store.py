"""Publishing replicas: a name appears whole or not at all, and is never overwritten.

In a folder a replica is copied beside its place and moved there by one rename. An
object store has no rename, so the manifest goes up last: without it there is no replica.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from anamorph.errors import ReplicaError, ReplicaExists, ReplicaRefused
from anamorph.replica.files import check_name, open_folder
from anamorph.replica.location import local_path, remote_path
from anamorph.replica.manifest import MANIFEST

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_STAGING = ".staging"


class Store:
    """Replicas under one root, by names such as ``tenant/model/v1``.

    Args:
        url: a folder's path, ``file:///…``, ``s3://bucket/prefix``, ``gs://…`` or ``memory://…``.
            Credentials never stand in the URL: the file system finds its own.

    Raises:
        SetupError: an unsupported scheme, credentials in the URL, or a missing package.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        path = local_path(url)
        self.url = f"file://{path}" if path is not None else str(url).rstrip("/")
        self._places: _Folders | _Objects = _Objects(self.url) if path is None else _Folders(path)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def url_of(self, name: str) -> str:
        """URL of the replica ``name``, whether it exists or not."""
        return f"{self.url}/{_checked(name)}"

    def publish(self, folder: Path, name: str) -> str:
        """Copy a sealed replica into the store; return its URL.

        Raises:
            ReplicaRefused: the folder holds no manifest, or a file that no replica holds.
            ReplicaExists: the name is taken; publishing never overwrites.
            OSError: the copy failed; nothing was published.
        """
        with open_folder(folder) as source:
            files = source.names()
        if MANIFEST not in files:
            raise ReplicaRefused(f"there is no {MANIFEST} in this folder: seal it before publishing")
        if self.exists(name):
            raise _taken(name)
        self._places.publish(folder, files, _checked(name))
        return self.url_of(name)

    def exists(self, name: str) -> bool:
        """Whether a replica is published under ``name``."""
        return self._places.exists(_checked(name))

    def fetch(self, name: str, into: Path) -> Path:
        """Copy a replica into the new folder ``into``, atomically; return ``into``. Verify it there.

        Raises:
            ReplicaRefused: no such replica, or it holds a file that no replica holds.
            ReplicaExists: ``into`` exists already.
        """
        return fetch(self.url_of(name), into)

    def delete(self, name: str) -> None:
        """Remove a replica; its name is free again. No error if there is none."""
        self._places.delete(_checked(name))

    def list(self) -> list[str]:
        """Sorted names of the published replicas."""
        return sorted(self._places.list())


def fetch(url: str | os.PathLike[str], into: Path) -> Path:
    """Copy the replica at ``url`` into the new folder ``into``, which appears whole or not at all.

    Raises:
        ReplicaRefused: no replica there, or it holds a file that no replica holds.
        ReplicaExists: ``into`` exists already.
    """
    if into.exists():
        raise ReplicaExists(f"{into} exists already; it is never overwritten")
    staging = _staging_beside(into, mode=0o700)
    try:
        with open_folder(url) as source:
            for name in source.names():
                with (staging / name).open("xb") as file:
                    file.writelines(source.chunks(name))
        _move(staging, into)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return into


class _Folders:
    """Places of a store in a local or mounted folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def exists(self, name: str) -> bool:
        return (self._root / name / MANIFEST).is_file()

    def publish(self, folder: Path, files: list[str], name: str) -> None:
        _clear_staging(self._root / name)
        staging = _staging_beside(self._root / name)
        try:
            for file in files:
                shutil.copyfile(folder / file, staging / file, follow_symlinks=False)
                _sync(staging / file)
            _sync(staging)
            _move(staging, self._root / name)
            _sync((self._root / name).parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def delete(self, name: str) -> None:
        place = self._root / name
        if not place.is_dir():
            return
        # Renamed first: a reader must never meet a replica that is half gone.
        trash = _staging_beside(place)
        place.rename(trash)
        shutil.rmtree(trash)

    def list(self) -> list[str]:
        found = (path.parent.relative_to(self._root) for path in self._root.glob(f"**/{MANIFEST}"))
        return [str(place) for place in found if not any(part.startswith(".") for part in place.parts)]


class _Objects:
    """Places of a store in an object store, through fsspec."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = remote_path(url)

    def _at(self, *parts: str) -> str:
        return "/".join([self._root.rstrip("/"), *parts])

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._at(name, MANIFEST)))

    def publish(self, folder: Path, files: list[str], name: str) -> None:
        # Left by an upload that was killed before its manifest: it may hold shards that this one lacks.
        self._remove(name)
        for file in files:
            check_name(file)
            if file != MANIFEST:
                self._fs.put_file(str(folder / file), self._at(name, file))
        try:
            # "create" is a conditional write, so that of two publishers one wins.
            self._fs.pipe_file(self._at(name, MANIFEST), (folder / MANIFEST).read_bytes(), mode="create")
        except OSError as error:
            # s3fs says "invalid argument" and not "exists" when the condition fails, so look.
            if self.exists(name):
                raise _taken(name) from error
            raise

    def delete(self, name: str) -> None:
        if self.exists(name):
            self._fs.rm_file(self._at(name, MANIFEST))
        self._remove(name)

    def _remove(self, name: str) -> None:
        self._fs.invalidate_cache()
        if self._fs.exists(self._at(name)):
            self._fs.rm(self._at(name), recursive=True)

    def list(self) -> list[str]:
        self._fs.invalidate_cache()
        prefix = self._root.rstrip("/") + "/"
        paths: list[Any] = self._fs.find(self._root) if self._fs.exists(self._root) else []
        found = [str(path) for path in paths if str(path).endswith(f"/{MANIFEST}")]
        return [path.removeprefix(prefix).removesuffix(f"/{MANIFEST}") for path in found]


def _checked(name: str) -> str:
    segments = name.split("/")
    if not all(_SEGMENT.fullmatch(part) and ".." not in part for part in segments):
        raise ReplicaError("a replica's name is segments of letters, digits, '.', '_' and '-', joined by '/'")
    return name


def _taken(name: str) -> ReplicaExists:
    return ReplicaExists(f"{name} is published already; delete it first if it must be replaced")


def _staging_beside(place: Path, mode: int = 0o755) -> Path:
    """A new folder on the same file system as ``place``."""
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.parent / f"{_STAGING}-{place.name}-{uuid.uuid4().hex}"
    staging.mkdir(mode=mode)
    return staging


def _clear_staging(place: Path) -> None:
    """Remove what publishers that were killed have left beside ``place``: it may be as big as a model."""
    for left in place.parent.glob(f"{_STAGING}-{place.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _move(staging: Path, place: Path) -> None:
    try:
        staging.rename(place)
    except OSError as error:
        if place.exists():
            raise ReplicaExists(f"{place} exists already; it is never overwritten") from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
