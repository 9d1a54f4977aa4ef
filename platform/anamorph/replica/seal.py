"""Giving a finished folder its signed manifest: the last step before it is a replica."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

from anamorph.errors import ReplicaRefused
from anamorph.replica.contents import screened
from anamorph.replica.files import Folder, LocalFolder
from anamorph.replica.manifest import MANIFEST, FileEntry, Identity, ReplicaManifest

Sign = Callable[[bytes], bytes]


def seal(folder: Path, identity: Identity, sign_with: Sign) -> ReplicaManifest:
    """Hash, sign and write ``anamorph.json`` into ``folder``, durably.

    Args:
        folder: holds every other file of the replica, complete.
        identity: what the manifest says about key, plan and base.
        sign_with: Ed25519 signing function, ``key.sign``.

    Raises:
        ReplicaRefused: a file in the folder has no place in a replica.
    """
    manifest = sign(build_manifest(folder, identity), sign_with)
    with (folder / MANIFEST).open("wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def build_manifest(folder: Path, identity: Identity) -> ReplicaManifest:
    """Manifest of the files in ``folder``, unsigned. An old manifest there is not counted.

    Raises:
        ReplicaRefused: a file in the folder has no place in a replica.
    """
    with LocalFolder.open(folder) as source:
        names = [name for name in source.names() if name != MANIFEST]
        if "config.json" not in names:
            raise ReplicaRefused("there is no config.json in this folder")
        files = {name: describe(source, name) for name in names}
    return ReplicaManifest(**identity.model_dump(), files=files)


def sign(manifest: ReplicaManifest, sign_with: Sign) -> ReplicaManifest:
    """The same manifest with its Ed25519 signature over ``signed_bytes()``."""
    signature = b64encode(sign_with(manifest.signed_bytes())).decode("ascii")
    return manifest.model_copy(update={"signature": signature})


def describe(folder: Folder, name: str) -> FileEntry:
    """Size and chunk digests of one file, read once and held to the rules of ``contents``.

    Raises:
        ReplicaRefused: the file names the base, runs code or carries metadata.
    """
    size, digests = 0, []
    for chunk in screened(folder, name):
        size += len(chunk)
        digests.append(hashlib.sha256(chunk).hexdigest())
    return FileEntry(size=size, chunks=tuple(digests))
