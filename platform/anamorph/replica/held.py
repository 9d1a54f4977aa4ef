"""A folder of weights, kept for as long as somebody loads or computes with it; verified, if a replica."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from anamorph.errors import ReplicaRefused
from anamorph.replica.manifest import ReplicaManifest
from anamorph.replica.verify import verify

States = dict[str, tuple[int, ...]]


class Kept:
    """A local folder that is kept from eviction until ``close`` or the end of the process.

    Args:
        folder: of the weights.
        use: descriptor whose lock keeps the folder; ``None`` for one that no cache holds.
    """

    def __init__(self, folder: Path, use: int | None = None) -> None:
        self.folder = folder
        self._use = use

    def check_unchanged(self) -> None:
        """To be called after loading; here nothing was verified, so nothing can differ."""

    def close(self) -> None:
        """Let the cache evict it again; twice does no harm."""
        if self._use is not None:
            os.utime(self._use)
            os.close(self._use)
            self._use = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class Held(Kept):
    """A verified replica in a local folder."""

    def __init__(self, folder: Path, manifest: ReplicaManifest, before: States, use: int | None) -> None:
        super().__init__(folder, use)
        self.manifest = manifest
        self._states = before

    def check_unchanged(self) -> None:
        """Refuse if any file was touched since it was verified.

        Every write, rename or change of mode moves a file's change time, which no process can set.

        Raises:
            ReplicaRefused: what was loaded may not be what was checked.
        """
        if states(self.folder) != self._states:
            raise ReplicaRefused("the replica's folder changed after it was verified")


def hold(
    folder: Path,
    public_key: bytes,
    *,
    key_id: str | None = None,
    manifest_sha256: str | None = None,
    use: int | None = None,
) -> Held:
    """Verify a replica that lies on this machine, where it lies. Other arguments and errors as ``verify``'s.

    Args:
        folder: of the replica.
        public_key: raw Ed25519 public key (32 bytes) from the version record.
        key_id: the key id that the replica must be made with, if known.
        manifest_sha256: SHA-256 of the manifest that must be there, if known (hexadecimal).
        use: descriptor whose lock keeps the folder from being evicted; ``close`` closes it.
    """
    # Taken first: whatever changes while it is verified shows afterwards.
    before = states(folder)
    manifest = verify(folder, public_key, key_id=key_id, manifest_sha256=manifest_sha256)
    return Held(folder, manifest, before, use)


def states(folder: Path) -> States:
    """What shows of any change to the files of a folder; nothing if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    except FileNotFoundError:
        return {}
    return {
        name: (one.st_ino, one.st_mode, one.st_size, one.st_mtime_ns, one.st_ctime_ns)
        for name, one in found.items()
    }
