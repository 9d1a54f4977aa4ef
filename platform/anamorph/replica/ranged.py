"""Reading parts of a replica where it lies, each byte checked before it is handed out.

What is checked is the very memory that the caller gets, so nothing can change in
between. A range costs the 4 MiB chunks that it touches, and no more.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from anamorph.errors import ReplicaRefused, StoreUnavailable
from anamorph.replica.files import Folder, open_folder
from anamorph.replica.manifest import CHUNK, ReplicaManifest
from anamorph.replica.verify import trusted_manifest

WAITS_S = (0.2, 1.0, 5.0)
"""Before another try, when a store does not answer; each is drawn from half of it to all of it."""
KEPT_CHUNKS = 8

T = TypeVar("T")


class RangedReplica:
    """Verified ranges of the files of one replica. May be used by several threads.

    Args:
        folder: where the replica lies; it stays the caller's to close.
        manifest: one that ``trusted_manifest`` has returned, for that is what everything is held against.
    """

    def __init__(self, folder: Folder, manifest: ReplicaManifest) -> None:
        self.manifest = manifest
        self._folder = folder
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def open(
        cls,
        location: str | os.PathLike[str],
        public_key: bytes,
        *,
        key_id: str | None = None,
        manifest_sha256: str | None = None,
    ) -> Iterator[RangedReplica]:
        """Open a replica by path or URL; of its files only the manifest is read. Arguments as ``verify``'s.

        Raises:
            ReplicaRefused: no replica there, or its manifest is unsigned or another one.
            StoreUnavailable: the store does not answer.
        """
        with open_folder(location) as folder:
            manifest = patiently(
                lambda: trusted_manifest(folder, public_key, key_id=key_id, manifest_sha256=manifest_sha256)
            )
            yield cls(folder, manifest)

    def size(self, name: str) -> int:
        """Bytes of one file.

        Raises:
            ReplicaRefused: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise ReplicaRefused(f"{name[:200]!r} is not in the manifest")
        return self.manifest.files[name].size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of one file, the latter excluded.

        Raises:
            ReplicaRefused: not in the manifest, outside of the file, or not what the manifest says.
            StoreUnavailable: the store does not answer, after a few tries.
        """
        if not 0 <= start <= stop <= self.size(name):
            raise ReplicaRefused(f"bytes {start} to {stop} are not in {name}")
        data = bytearray()
        for index in range(start // CHUNK, -(-stop // CHUNK)):
            begin = index * CHUNK
            chunk = memoryview(self._recent(name, index))
            data += chunk[max(start - begin, 0) : stop - begin]
        return bytes(data)

    def chunk(self, name: str, index: int) -> bytes:
        """One chunk of 4 MiB, the last of a file shorter. Raises as ``read`` does."""
        entry = self.manifest.files[name]
        start, stop = index * CHUNK, min((index + 1) * CHUNK, entry.size)
        # What arrives damaged once may have been damaged on the way.
        for _ in range(2):
            data = patiently(lambda: self._folder.read(name, start, stop))
            if entry.matches(index, data):
                return data
        raise ReplicaRefused(f"{name} differs from the manifest")

    def _recent(self, name: str, index: int) -> bytes:
        """A chunk through a small memory: neighbouring tensors share chunks."""
        with self._lock:
            if (name, index) in self._kept:
                self._kept.move_to_end((name, index))
                return self._kept[name, index]
        data = self.chunk(name, index)
        with self._lock:
            self._kept[name, index] = data
            while len(self._kept) > KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return data


def patiently(ask: Callable[[], T]) -> T:
    """What ``ask`` returns, asked again a few times while the store does not answer.

    Raises:
        StoreUnavailable: as ``ask`` does, the last time.
    """
    for wait_s in WAITS_S:
        try:
            return ask()
        except StoreUnavailable:
            # Drawn, so that the actors of a cluster do not come back all at once.
            time.sleep(wait_s * random.uniform(0.5, 1))  # noqa: S311 - no secret
    return ask()
