"""From a key and a base to a published replica, in the order in which it happens:

    key × table → plan → fold → manifest → verify → publish → probe

Read this first; each step is one call into the package that does it. Every step may
be killed: what is finished is found again, what is not has left nothing that looks done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from anamorph import checkpoint
from anamorph.checkpoint import MAX_SHARD_SIZE, FoldReport
from anamorph.checkpoint.probe import make_probe
from anamorph.errors import BaseRefused, ReplicaExists, ReplicaRefused
from anamorph.keys import TenantKey
from anamorph.replica import Identity, ReplicaManifest, Store, fetch, keyed_tag, seal, verify
from anamorph.replica.location import local_path
from anamorph.wire.admin import Dtype, Materialized, Profile

Progress = Callable[[str, float], None]
"""Called with the name of a phase and how much of it is done, 0 to 1."""


def _silent(_phase: str, _done: float) -> None:
    """Nobody listens."""


def make_replica(
    base: Path,
    store: Store,
    name: str,
    key: TenantKey,
    profile: Profile = "rotate",
    *,
    scratch: Path,
    dtype: Dtype = "auto",
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    workers: int = 1,
    parts: int = 0,
    base_digest: str | None = None,
    progress: Progress = _silent,
) -> Materialized:
    """Make a replica of ``base`` under ``key``, publish it as ``name``, and return what to report.

    Args:
        base: folder of the plaintext checkpoint.
        store: where replicas are published.
        name: name in the store, ``tenant/model/vN``.
        key: what the replica is made with and signed by.
        profile: ``rotate``, or ``permute``, which moves weights and never rounds them.
        scratch: folder for this version's work in progress; what a killed run finished is taken up.
        dtype: what the replica will be served in.
        device: torch device of the products.
        max_shard_size: bytes of a shard.
        workers: processes that fold; the bytes are the same with any number.
        parts: into how many ``make_part`` has divided the fold, which is then only finished here.
        base_digest: what the base must be, as ``Checkpoint.digest`` says it; ``None`` if any will do.
        progress: told what is being done.

    Raises:
        UnsupportedModel: no table covers the base.
        CheckpointError: the base cannot be read.
        BaseRefused: the base, or what is published already, is not of ``base_digest``.
        FoldInterrupted: a part is missing.
        MaterializationError: the replica does not compute what the base computes.
        ReplicaRefused: ``name`` is taken by something that this key has not made.
    """
    folded = scratch / "replica"
    if not store.exists(name):
        ready = _finished(folded, key)
        if not ready and parts:
            _join(base, folded, key, profile, parts, max_shard_size, progress)
        elif not ready:
            fold(
                base,
                folded,
                key,
                profile,
                device=device,
                max_shard_size=max_shard_size,
                workers=workers,
                progress=progress,
            )
        progress("compare", 0.0)
        checkpoint.compare(base, folded, key, device=device).check()
        progress("publish", 0.0)
        store.publish(folded, name)
    published = store.url_of(name)
    manifest = verify(published, key.public_key(), key_id=key.id)
    _check_base(manifest, key, base_digest)
    return _probed(published, manifest, folded, key, dtype, device, progress)


def make_part(
    base: Path,
    store: Store,
    name: str,
    key: TenantKey,
    profile: Profile = "rotate",
    *,
    scratch: Path,
    index: int,
    of: int,
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = _silent,
) -> int:
    """Make part ``index`` of ``of`` of the replica that ``make_replica`` with ``parts=of`` finishes.

    ``scratch`` is a folder that all parts and the one who finishes share. Repeated, a part goes on from
    its finished files; when the replica is there already, nothing is left to do.

    Returns:
        Files that this call has written.

    Raises:
        UnsupportedModel: no table covers the base.
        CheckpointError: the base cannot be read, parts of another fold lie there, or it is being finished.
        ReplicaRefused: a replica lies there that this key has not made.
    """
    folded = scratch / "replica"
    if store.exists(name):
        verify(store.url_of(name), key.public_key(), key_id=key.id)
        return 0
    try:
        return checkpoint.fold_part(
            base,
            folded,
            key,
            profile,
            index=index,
            of=of,
            device=device,
            max_shard_size=max_shard_size,
            progress=lambda done, total: progress("fold", done / total if total else 1.0),
        )
    except ReplicaExists:  # it has been finished, perhaps just now
        verify(folded, key.public_key(), key_id=key.id)
        return 0


def fold(
    base: Path,
    out: Path,
    key: TenantKey,
    profile: Profile = "rotate",
    *,
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    workers: int = 1,
    progress: Progress = _silent,
) -> ReplicaManifest:
    """Write a signed replica of ``base`` to the new folder ``out``, and verify what was written.

    ``out`` appears by one rename, with its manifest, or not at all; a killed fold resumes when called again.

    Raises:
        UnsupportedModel: no table covers the base.
        CheckpointError: the base cannot be read.
        ReplicaExists: ``out`` exists.
    """
    checkpoint.fold(
        base,
        out,
        key,
        profile,
        device=device,
        max_shard_size=max_shard_size,
        workers=workers,
        progress=lambda done, total: progress("fold", done / total),
        finish=_sealing(key, progress),
    )
    return verify(out, key.public_key(), key_id=key.id)


def _join(
    base: Path,
    out: Path,
    key: TenantKey,
    profile: Profile,
    parts: int,
    max_shard_size: int,
    progress: Progress,
) -> None:
    """Sign what others have folded."""
    progress("join", 0.0)
    checkpoint.join_parts(
        base, out, key, profile, of=parts, max_shard_size=max_shard_size, finish=_sealing(key, progress)
    )


def _sealing(key: TenantKey, progress: Progress) -> Callable[[Path, FoldReport], None]:
    def finish(staging: Path, report: FoldReport) -> None:
        progress("manifest", 0.0)
        seal(staging, _identity(key, report), key.sign)

    return finish


def _check_base(manifest: ReplicaManifest, key: TenantKey, base_digest: str | None) -> None:
    """Refuse what was published before the base changed: the caller has only looked at the base of now."""
    if base_digest is not None and manifest.base_tag != _base_tag(key, base_digest):
        raise BaseRefused(
            f"what is published of this version is of another base than {base_digest}: rotate the model"
        )


def _probed(
    url: str,
    manifest: ReplicaManifest,
    folded: Path,
    key: TenantKey,
    dtype: Dtype,
    device: str,
    progress: Progress,
) -> Materialized:
    """What to report of the replica at ``url``, which has been verified where it is served from."""
    progress("probe", 0.0)
    probe = make_probe(_at_hand(url, folded, key), dtype=dtype, device=device)
    return Materialized(replica=url, manifest_sha256=manifest.sha256(), probe=probe)


def _base_tag(key: TenantKey, base_digest: str) -> str:
    return keyed_tag(key.subkey("plan"), bytes.fromhex(base_digest.removeprefix("sha256:")))


def _identity(key: TenantKey, report: FoldReport) -> Identity:
    return Identity(
        key_id=key.id,
        kcv=key.kcv,
        vocab_kcv=key.vocab_kcv,
        profile=report.plan.profile,
        table=report.plan.table_id,
        base_tag=_base_tag(key, report.base_digest),
        plan_tag=keyed_tag(key.subkey("plan"), report.plan.canonical()),
        added=report.plan.added,
    )


def _finished(folded: Path, key: TenantKey) -> bool:
    """Whether a run that was killed has left a whole replica; anything less is removed."""
    if not folded.exists():
        return False
    try:
        verify(folded, key.public_key(), key_id=key.id)
    except ReplicaRefused:
        shutil.rmtree(folded)
        return False
    return True


def _at_hand(url: str, folded: Path, key: TenantKey) -> Path:
    """A local folder with the published replica: itself, the one just folded, or a copy."""
    place = local_path(url)
    if place is not None or _finished(folded, key):
        return place or folded
    return fetch(url, folded)
