"""Writing checkpoints to a folder or an object store: one object per row, never overwritten."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from anamorph.errors import AuditRefused, SetupError, Unavailable
from anamorph.wire.checkpoints import SignedCheckpoint, decode, encode, object_name


def export(destination: str, checkpoint: SignedCheckpoint) -> bool:
    """Write a checkpoint to its place below ``destination``, whole or not at all.

    Args:
        destination: a folder, ``file:///…``, ``s3://bucket/prefix`` or another of fsspec's URLs.
            Credentials never stand in it: the file system finds its own. Where the store can
            lock objects, lock them: then nobody can take a checkpoint back.
        checkpoint: signed already; its tenant and sequence are its place.

    Returns:
        Whether it was written; ``False`` if a checkpoint of the same row lay there already.

    Raises:
        AuditRefused: what lies there is a checkpoint of another chain, or none at all.
        Unavailable: the destination does not answer, or refuses.
        SetupError: the URL carries credentials, or its file system is not installed.
    """
    filesystem, root = _opened(destination)
    place = f"{root.rstrip('/')}/{object_name(checkpoint.tenant, checkpoint.sequence)}"
    try:
        if _create(filesystem, place, encode(checkpoint)):
            return True
        content: bytes = filesystem.cat_file(place)
    # Every file system has exceptions of its own; their texts may quote what they were configured with.
    except Exception as error:
        what = type(error).__name__
        raise Unavailable(
            f"checkpoints cannot be exported ({what}): is the destination there, and writable?"
        ) from error
    _check_same(content, checkpoint)
    return False


def _opened(destination: str) -> tuple[Any, str]:
    if "@" in urlsplit(destination).netloc or "::" in destination:
        # The message must not repeat the URL: what it refuses may be a password.
        raise SetupError("a destination carries no credentials and no chain: configure them outside the URL")
    try:
        filesystem, root = fsspec.core.url_to_fs(destination)
    except (ImportError, ValueError) as error:
        scheme = urlsplit(destination).scheme[:20]
        raise SetupError(f"{scheme}:// is unknown or needs a package: for S3, pip install s3fs") from error
    return filesystem, str(root)


def _create(filesystem: Any, place: str, content: bytes) -> bool:
    """Write a new object; ``False`` if there is one already."""
    if isinstance(filesystem, LocalFileSystem):
        return write_once(Path(place), content, mode=0o444)
    filesystem.invalidate_cache()
    if filesystem.exists(place):
        return False
    try:
        # "create" is a conditional write, so that of two exporters one wins.
        filesystem.pipe_file(place, content, mode="create")
    except OSError:
        # s3fs says "invalid argument" and not "exists" when the condition fails, so look.
        filesystem.invalidate_cache()
        if filesystem.exists(place):
            return False
        raise
    return True


def _check_same(content: bytes, checkpoint: SignedCheckpoint) -> None:
    try:
        there = decode(content)
    except AuditRefused:
        there = None
    if there is None or (there.tenant, there.head) != (checkpoint.tenant, checkpoint.head):
        raise AuditRefused(
            f"row {checkpoint.sequence} of {checkpoint.tenant} was exported before with another content:"
            " the log was tampered with, or the database comes from a backup"
        )


def write_once(path: Path, content: bytes, *, mode: int) -> bool:
    """Write a new file, whole or not at all and durably; ``False`` if the name is taken.

    Raises:
        OSError: the folder cannot be written, or knows no hard links.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A hard link, unlike a rename, fails when the name is taken.
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
