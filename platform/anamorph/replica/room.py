"""Room in the cache: what lies there, what may go, and in which order.

    FOLDER/entries/DIGEST   whole replicas, by the SHA-256 of their manifest; plaintext baselines,
                            by that of URL and listing
    FOLDER/partial/DIGEST   replicas being fetched, their files at full length from the start
    FOLDER/trash/…          being removed
    FOLDER/locks/DIGEST.use held shared by every process that uses or fetches the replica
    FOLDER/locks/DIGEST.fill held by the one that writes it
    FOLDER/locks/room       held while room is made

Locks are always taken in that order; whoever holds ``room`` waits for nobody.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from anamorph.errors import SetupError
from anamorph.replica.locks import locked
from anamorph.replica.manifest import MANIFEST

ABANDONED_S = 3600.0
"""After this long, what a killed process was fetching is removed even if nothing needs the room."""


@dataclass(frozen=True)
class Item:
    """A folder in the cache: an entry, or one being fetched.

    Args:
        size: bytes, as the files say; a file that is being written has its full length.
        used: seconds since the epoch.
    """

    path: Path
    size: int
    used: float
    whole: bool


class Room:
    """The bookkeeping of one cache folder, shared by all processes of a node.

    Args:
        folder: exists and is private.
        limit: bytes of entries, and of those being fetched, together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        for part in ("entries", "partial", "trash", "locks"):
            (folder / part).mkdir(mode=0o700, exist_ok=True)

    def entry(self, digest: str) -> Path:
        """Where the whole replica lies, if it is there."""
        return self.folder / "entries" / digest

    def partial(self, digest: str) -> Path:
        """Where the replica is while it is fetched."""
        return self.folder / "partial" / digest

    def use_lock(self, digest: str) -> Path:
        """Held shared by users, alone by who evicts; its time is that of the last use."""
        return self.folder / "locks" / f"{digest}.use"

    def fill_lock(self, digest: str) -> Path:
        """Held by who fetches or repairs; its time moves as that goes on."""
        return self.folder / "locks" / f"{digest}.fill"

    def reserve(self, digest: str, sizes: Mapping[str, int]) -> None:
        """Make room, and ``partial`` with this replica's files in it at their full length.

        What a killed process has left of the same replica stays in it.

        Args:
            digest: names the entry.
            sizes: bytes of each file.

        Raises:
            SetupError: the replica is larger than the limit or the disk, or the rest is in use.
        """
        need = sum(sizes.values())
        if need > self.limit:
            raise SetupError(
                f"the replica has {need} bytes, more than the cache may hold: "
                f"raise cache.limit_bytes ({self.limit})"
            )
        partial = self.partial(digest)
        with locked(self.folder / "locks" / "room"):
            self._tidy()
            self._evict(need, _missing(partial, need), besides=partial)
            with writing(partial):
                partial.mkdir(mode=0o700, exist_ok=True)
                lay_out(partial, sizes)

    def trim(self) -> None:
        """Remove what is left over and what is beyond the limit, unless somebody is at it already."""
        with locked(self.folder / "locks" / "room", wait=False) as ours:
            if ours:
                self._tidy()
                with suppress(SetupError):
                    self._evict(0, 0, besides=None)

    def _tidy(self) -> None:
        for path in (self.folder / "trash").iterdir():
            shutil.rmtree(path, ignore_errors=True)
        for item in self._items("partial"):
            if item.used < time.time() - ABANDONED_S:
                self._remove(item)

    def _evict(self, need: int, disk: int, besides: Path | None) -> None:
        """Remove the least recently used until ``need`` bytes fit the limit, and ``disk`` the disk."""
        items = [item for item in (*self._items("partial"), *self._items("entries")) if item.path != besides]
        held = sum(item.size for item in items)
        for item in sorted(items, key=lambda item: (item.whole, item.used)):
            if held + need <= self.limit and disk <= self._free():
                return
            if self._remove(item):
                held -= item.size
        if held + need > self.limit:
            raise SetupError(
                f"the cache {self.folder} is full: {held} bytes are in use, {need} more do not fit "
                f"cache.limit_bytes ({self.limit}): raise it, or stop an engine"
            )
        if disk > self._free():
            raise SetupError(f"the disk of the cache {self.folder} is full: free {disk} bytes there")

    def _remove(self, item: Item) -> bool:
        """Remove a folder unless somebody uses or writes it; it never lies half-removed under its name."""
        digest = item.path.name
        with (
            locked(self.use_lock(digest), wait=False) as unused,
            locked(self.fill_lock(digest), wait=False) as still,
        ):
            if not (unused and still):
                return False
            trash = self.folder / "trash" / uuid.uuid4().hex
            try:
                item.path.rename(trash)
            except FileNotFoundError:  # published since it was listed
                return False
            for path in (self.use_lock(digest), self.fill_lock(digest)):
                path.unlink()
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _items(self, part: str) -> Iterator[Item]:
        for path in list((self.folder / part).iterdir()):
            if not path.is_dir():
                continue
            digest, whole = path.name, part == "entries"
            clock = self.use_lock(digest) if whole else self.fill_lock(digest)
            with suppress(FileNotFoundError):  # published or removed meanwhile
                used = clock.stat().st_mtime if clock.exists() else 0.0
                yield Item(path, sum(one.lstat().st_size for one in path.iterdir()), used, whole)

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the disk refuses, said in words.

    Raises:
        SetupError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"cannot write the cache {folder}: {error.strerror or type(error).__name__}; "
            "free some of its disk, or name another folder in cache.folder"
        ) from error


def lay_out(folder: Path, sizes: Mapping[str, int]) -> None:
    """Give every file its length; what is no plain file of this replica is removed.

    A file that has its length already is not touched: others may be reading it.
    """
    for path in folder.iterdir():
        known = path.name in sizes or path.name == MANIFEST
        if not known or path.is_symlink() or not path.is_file():
            remove(path)
    for name, size in sizes.items():
        with opened(folder / name) as descriptor:
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, size)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read and write one file, made if need be, never through a link."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _missing(partial: Path, need: int) -> int:
    """Bytes of disk that a fetch still takes; files that were begun have blocks already."""
    if not partial.is_dir():
        return need
    return max(need - sum(path.lstat().st_blocks * 512 for path in partial.iterdir()), 0)
