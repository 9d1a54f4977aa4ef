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
from anamorph.checkpoint.probe import make_probe
from anamorph.errors import ReplicaRefused
from anamorph.keys import TenantKey
from anamorph.replica import Identity, ReplicaManifest, Store, fetch, keyed_tag, seal, verify
from anamorph.replica.location import local_path
from anamorph.wire.admin import Dtype, Materialized, Profile

Progress = Callable[[str, float], None]
"""Called with the name of a phase and how much of it is done, 0 to 1."""

MAX_SHARD_SIZE = 2**29
"""Bytes of a shard, unless the caller says otherwise."""


def _silent(_phase: str, _done: float) -> None:
    """The default: nobody listens."""


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
    progress: Progress = _silent,
) -> Materialized:
    """Make a replica of ``base`` under ``key`` and publish it as ``name``; return what to report.

    Args:
        base: folder of the plaintext checkpoint.
        store: where replicas are published.
        scratch: folder of this version's work in progress; finished parts of a killed run are taken up.
        dtype: what the replica will be served in.
        device: torch device of the products.
        max_shard_size: bytes of a shard.

    Raises:
        UnsupportedModel: no table covers the base.
        CheckpointError: the base cannot be read.
        MaterializationError: the replica does not compute what the base computes.
        ReplicaRefused: ``name`` is taken by something that this key has not made.
    """
    url = store.url_of(name)
    folded = scratch / "replica"
    if not store.exists(name):
        _take_up(folded, key) or fold(base, folded, key, profile, device=device, ...)
        checkpoint.compare(base, folded, key)
        store.publish(folded, name)
    manifest = verify(url, key.public_key(), key_id=key.id)
    probe = make_probe(_at_hand(url, folded, key), dtype=dtype, device=device)
    return Materialized(replica=url, manifest_sha256=manifest.sha256(), probe=probe)
