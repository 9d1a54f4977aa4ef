"""Checking a replica before anything reads it. It raises; it never answers "maybe"."""

from __future__ import annotations

import hmac
import os
from base64 import b64decode

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from anamorph.errors import InvalidKey, ReplicaRefused
from anamorph.replica.contents import screened
from anamorph.replica.files import Folder, open_folder, read_small
from anamorph.replica.manifest import MANIFEST, MAX_MANIFEST, FileEntry, ReplicaManifest


def verify(
    location: str | os.PathLike[str],
    public_key: bytes,
    *,
    key_id: str | None = None,
    manifest_sha256: str | None = None,
) -> ReplicaManifest:
    """Check everything about a replica; return its manifest only if all of it holds.

    Reads every byte once. What is loaded afterwards must not be writable by anyone
    the verifier does not trust: a local folder can change after this returns.

    Args:
        location: folder, ``file://`` or object-store URL.
        public_key: raw Ed25519 public key (32 bytes) from the version record, never from the replica.
        key_id: the key id that the replica must be made with, if known.
        manifest_sha256: SHA-256 of the manifest that must be there, if known (hexadecimal).

    Raises:
        ReplicaRefused: unsigned, altered, foreign, incomplete, or holding more than it should.
        InvalidKey: ``public_key`` is not an Ed25519 public key.
    """
    _anchor(public_key)
    with open_folder(location) as folder:
        names = folder.names()
        if MANIFEST not in names:
            raise ReplicaRefused(f"there is no {MANIFEST}: this is not a replica")
        manifest = trusted_manifest(folder, public_key, key_id=key_id, manifest_sha256=manifest_sha256)
        check_names(names, manifest)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        if folder.names() != names:
            raise ReplicaRefused("the replica's folder changed while it was read")
    return manifest


def _anchor(public_key: bytes) -> Ed25519PublicKey:
    if not isinstance(public_key, bytes) or len(public_key) != 32:
        raise InvalidKey("the trust anchor is the 32 raw bytes of an Ed25519 public key")
    return Ed25519PublicKey.from_public_bytes(public_key)


def trusted_manifest(
    folder: Folder, public_key: bytes, *, key_id: str | None, manifest_sha256: str | None
) -> ReplicaManifest:
    """The folder's manifest, if it is signed and the one that is expected; no other file is read.

    Raises:
        ReplicaRefused: unsigned, altered, or another one.
        InvalidKey: ``public_key`` is not an Ed25519 public key.
    """
    anchor = _anchor(public_key)
    manifest = ReplicaManifest.from_bytes(read_small(folder, MANIFEST, MAX_MANIFEST))
    try:
        anchor.verify(b64decode(manifest.signature), manifest.signed_bytes())
    except InvalidSignature:
        raise ReplicaRefused("the manifest is not signed by the key of this version") from None
    _check_pins(manifest, key_id, manifest_sha256)
    return manifest


def _check_pins(manifest: ReplicaManifest, key_id: str | None, manifest_sha256: str | None) -> None:
    if key_id is not None and not hmac.compare_digest(manifest.key_id.encode(), key_id.encode()):
        raise ReplicaRefused(f"the replica is made for key {manifest.key_id}, not {key_id}")
    if manifest_sha256 is not None and manifest.sha256() != manifest_sha256.lower():
        raise ReplicaRefused("the manifest is signed, but is not the one in the version record")


def check_names(names: list[str], manifest: ReplicaManifest) -> None:
    """Refuse a listing that is not exactly what the manifest says."""
    present, listed = set(names) - {MANIFEST}, set(manifest.files)
    for name in sorted(listed - present):
        raise ReplicaRefused(f"{name} is missing")
    for name in sorted(present - listed):
        raise ReplicaRefused(f"{name} is not in the manifest")


def _check_file(folder: Folder, name: str, entry: FileEntry) -> None:
    count = 0
    for index, chunk in enumerate(screened(folder, name)):
        if index >= len(entry.chunks) or not entry.matches(index, chunk):
            raise ReplicaRefused(f"{name} differs from the manifest")
        count += 1
    if count != len(entry.chunks):
        raise ReplicaRefused(f"{name} is shorter than the manifest says")
