"""A cache of replicas on one node: fetched once, checked always, shared by all its processes.

An entry is a promise of nothing: whoever loads from it verifies every byte first, under a
lock that keeps it from being evicted. So an entry that a dying process left, or that a
disk has damaged, costs a repair and never a wrong answer.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from anamorph.errors import ReplicaRefused, SetupError, StoreUnavailable
from anamorph.replica.files import open_folder
from anamorph.replica.fill import Progress, fill
from anamorph.replica.held import Held, Kept, hold, states
from anamorph.replica.locks import lock
from anamorph.replica.plain import fill_plain
from anamorph.replica.ranged import RangedReplica, patiently
from anamorph.replica.room import Room, writing
from anamorph.replica.stored import Listing, StoredCheckpoint
from anamorph.replica.verify import check_names, trusted_manifest

DEFAULT_LIMIT = 200 * 2**30
STALLED_S = 600.0
"""How long another process may fetch nothing before those who wait for it give up."""

_POLL_S = 0.05
_ROUNDS = 3
_DIGEST = re.compile(r"[0-9a-f]{64}")

Phase = Callable[[str], AbstractContextManager[None]]
AnyKept = TypeVar("AnyKept", bound=Kept)


@dataclass(frozen=True)
class _Wanted:
    """A replica as it was asked for, and the digest that names its entry."""

    location: str | os.PathLike[str]
    public_key: bytes
    key_id: str | None
    digest: str


class Cache:
    """Replicas of a store on this node's disk.

    Args:
        folder: private to one user; made if it does not exist. By default in the temporary folder.
        limit: bytes; beyond it, entries that nobody uses are removed, the least recently used first.
        progress: called with bytes fetched and bytes in all.
        phase: ``with phase("fetch")`` and ``with phase("verify")`` surround the work, for those who time it.

    Raises:
        SetupError: the folder is another user's, or open to others.
    """

    def __init__(
        self,
        folder: Path | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        progress: Progress = lambda _done, _total: None,
        phase: Phase = lambda _name: nullcontext(),
    ) -> None:
        self._room = Room(_private(folder or _default_folder()), limit)
        self._progress = progress
        self._phase = phase

    def hold(
        self,
        location: str | os.PathLike[str],
        public_key: bytes,
        *,
        key_id: str | None = None,
        manifest_sha256: str | None = None,
    ) -> Held:
        """A verified copy of the replica at ``location``, fetched unless it is here already.

        With ``manifest_sha256`` a good copy is found without asking the store. Of several
        processes that ask at once, one fetches and the others wait for it.

        Args:
            location: path or URL.
            public_key: raw Ed25519 public key (32 bytes) from the version record.
            key_id: the key id that the replica must be made with, if known.
            manifest_sha256: SHA-256 of the manifest that must be there, if known (hexadecimal).

        Raises:
            ReplicaRefused: what the store holds is not the replica that was asked for.
            StoreUnavailable: the store does not answer, or the process that fetches has stalled.
            SetupError: it does not fit the cache or the disk.
            InvalidKey: ``public_key`` is not an Ed25519 public key.
        """
        digest = manifest_sha256 or self._digest_at(location, public_key, key_id)
        if not _DIGEST.fullmatch(digest):
            raise ReplicaRefused("a manifest's digest is 64 hexadecimal digits, lower case")
        return self._using(digest, lambda use: self._held(_Wanted(location, public_key, key_id, digest), use))

    def hold_plain(self, url: str) -> Kept:
        """A copy of the plaintext checkpoint at ``url``: nothing vouches for it, it is for baselines only.

        Its entry bears the SHA-256 of URL, names, sizes and marks that the store lists, so the store is
        asked each time. A fetch that was killed begins anew.

        Raises:
            BaseRefused: no checkpoint there, or none that may be read.
            CheckpointError: it changed while it was fetched.
            StoreUnavailable: the store does not answer, or the process that fetches has stalled.
            SetupError: it does not fit the cache or the disk.
        """
        source = StoredCheckpoint(url)
        with self._phase("fetch"):
            wanted = source.wanted()
        return self._using(source.state(wanted), lambda use: self._plain(source, wanted, use))

    def _using(self, digest: str, keep: Callable[[int], AnyKept]) -> AnyKept:
        """What ``keep`` makes of a lock that keeps the entry from being evicted."""
        use = lock(self._room.use_lock(digest), shared=True)
        assert use is not None  # noqa: S101 - it was waited for
        try:
            os.utime(use)
            kept = keep(use)
        except BaseException:
            os.close(use)
            raise
        self._room.trim()
        return kept

    def _plain(self, source: StoredCheckpoint, wanted: Listing, use: int) -> Kept:
        digest = source.state(wanted)
        entry, partial = self._room.entry(digest), self._room.partial(digest)
        with self._phase("fetch"), self._filling(digest) as beat:
            if not entry.exists():
                self._room.reserve(digest, {name: one.size for name, one in wanted.items()})
                with writing(partial):
                    fill_plain(partial, source, wanted, self._told(beat), resume=False)
                    partial.rename(entry)
        return Kept(entry, use)

    def _told(self, beat: Callable[[], None]) -> Progress:
        """Progress that also says that the work goes on."""

        def progress(done: int, total: int) -> None:
            beat()
            self._progress(done, total)

        return progress

    def _digest_at(self, location: str | os.PathLike[str], public_key: bytes, key_id: str | None) -> str:
        with (
            self._phase("fetch"),
            RangedReplica.open(location, public_key, key_id=key_id) as replica,
        ):
            return replica.manifest.sha256()

    def _held(self, wanted: _Wanted, use: int) -> Held:
        entry = self._room.entry(wanted.digest)
        refused: ReplicaRefused | None = None
        for _ in range(_ROUNDS):
            seen = states(entry)
            if seen:
                try:
                    return self._verified(entry, wanted, use)
                except ReplicaRefused as error:
                    refused = error
            with self._phase("fetch"), self._filling(wanted.digest) as beat:
                # Unless another process has brought or repaired it while this one waited.
                if states(entry) == seen:
                    self._bring(wanted, beat)
        raise refused or ReplicaRefused("the replica does not stay in the cache: something removes it")

    def _verified(self, entry: Path, wanted: _Wanted, use: int) -> Held:
        with self._phase("verify"):
            return hold(
                entry, wanted.public_key, key_id=wanted.key_id, manifest_sha256=wanted.digest, use=use
            )

    def _bring(self, wanted: _Wanted, beat: Callable[[], None]) -> None:
        """Fetch what is missing or wrong of one replica; what arrives is checked before it is written."""
        pins = {"key_id": wanted.key_id, "manifest_sha256": wanted.digest}
        with open_folder(wanted.location) as folder:
            manifest = patiently(lambda: trusted_manifest(folder, wanted.public_key, **pins))
            check_names(patiently(folder.names), manifest)
            self._fill(wanted.digest, RangedReplica(folder, manifest), self._told(beat))

    def _fill(self, digest: str, source: RangedReplica, progress: Progress) -> None:
        entry, partial = self._room.entry(digest), self._room.partial(digest)
        if entry.exists():
            fill(entry, source, progress)
            return
        try:
            self._room.reserve(digest, source.manifest.sizes)
            fill(partial, source, progress)
        except (ReplicaRefused, SetupError):
            # Not so when the store is away: what has come is taken up by the next try.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(entry)

    @contextmanager
    def _filling(self, digest: str) -> Iterator[Callable[[], None]]:
        """Hold the right to write one entry; yields what says that the work goes on."""
        descriptor = self._await_fill(self._room.fill_lock(digest))
        try:
            os.utime(descriptor)
            yield lambda: os.utime(descriptor)
        finally:
            os.close(descriptor)

    def _await_fill(self, path: Path) -> int:
        seen, since = 0, time.monotonic()
        while (descriptor := lock(path, wait=False)) is None:
            beat = path.stat().st_mtime_ns if path.exists() else 0
            if beat != seen:
                seen, since = beat, time.monotonic()
            if time.monotonic() - since > STALLED_S:
                raise StoreUnavailable(
                    f"another process fetches this replica and got nothing for {STALLED_S:.0f} s: see {path}"
                )
            time.sleep(_POLL_S)
        return descriptor


def _default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"anamorph-cache-{os.geteuid()}"


def _private(folder: Path) -> Path:
    """The folder, made if need be, if nobody else can write or read it."""
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise SetupError(f"the cache {folder} is a link or another user's: name another one in cache.folder")
    if status.st_mode & 0o077:
        raise SetupError(f"the cache {folder} is open to other users; run: chmod 700 {folder}")
    return folder
