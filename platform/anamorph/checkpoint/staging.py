"""A place to build a replica in, so that what bears its name is whole.

Beside OUT, a hidden folder holds a lock, a journal that says which fold it belongs to,
and the replica so far. A killed fold finds its finished shards again; a failed one
leaves nothing; a finished one becomes OUT by one rename.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anamorph.errors import CheckpointError, FoldInterrupted, ReplicaExists

JOURNAL = "journal"
CONTENT = "replica"


@contextmanager
def staged(out: Path, binding: str) -> Iterator[Path]:
    """Yield the folder to fill; publish it as ``out`` at the end.

    ``binding`` says what is being built: content of another binding is discarded.

    Raises:
        ReplicaExists: ``out`` exists.
        CheckpointError: another process is building ``out``, or a file cannot be written.
    """
    folder = _beside(out)
    with _locked(folder):
        try:
            content = _bound(folder, binding)
            yield content
            _publish(content, out)
        except FoldInterrupted:
            raise
        except Exception as error:
            # Work to resume is left by a kill or an interrupt only: an error would be resumed into again.
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
            raise
        shutil.rmtree(folder)


@contextmanager
def joined(out: Path, binding: str) -> Iterator[Path]:
    """Yield the folder that ``staged`` will publish, to fill a part of it beside others who do.

    Raises:
        ReplicaExists: ``out`` exists.
        CheckpointError: ``out`` is being finished, parts of another fold lie there,
            or a file cannot be written.
    """
    folder = _beside(out)
    with _locked(folder, shared=True):
        try:
            yield _shared(folder, binding)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error


@contextmanager
def gathered(out: Path, binding: str) -> Iterator[Path]:
    """Yield the folder that parts have filled through ``joined``; publish it as ``out`` at the end.

    Unlike in ``staged`` an error leaves what is there: it has cost others their time.

    Raises:
        ReplicaExists: ``out`` exists.
        CheckpointError: a part is still being made, parts of another fold lie there,
            or a file cannot be written.
    """
    folder = _beside(out)
    with _locked(folder):
        try:
            content = _shared(folder, binding)
            yield content
            _publish(content, out)
        except OSError as error:
            raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
        shutil.rmtree(folder)


def _beside(out: Path) -> Path:
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.folding")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def refuse_existing(out: Path) -> None:
    """Refuse to go on when the place is taken.

    Raises:
        ReplicaExists: there is something at ``out``.
    """
    if os.path.lexists(out):
        raise ReplicaExists(f"{out} exists, and a replica is never overwritten; choose another folder")


@contextmanager
def _locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _lock(descriptor, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            raise CheckpointError(f"another process is folding into {folder}; wait for it to finish")
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        # The lock counts only if the folder is still the one that bears the name.
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _bound(folder: Path, binding: str) -> Path:
    content, journal = folder / CONTENT, folder / JOURNAL
    if not journal.exists() or journal.read_text(encoding="ascii") != binding:
        shutil.rmtree(content, ignore_errors=True)
        journal.write_text(binding, encoding="ascii")
    content.mkdir(exist_ok=True)
    return content


def _shared(folder: Path, binding: str) -> Path:
    content, journal = folder / CONTENT, folder / JOURNAL
    own = folder / f"{JOURNAL}-{uuid.uuid4().hex}"
    own.write_text(binding, encoding="ascii")
    try:
        # A hard link, unlike a rename, fails when another part was faster.
        os.link(own, journal)
    except FileExistsError:
        if journal.read_text(encoding="ascii") != binding:
            raise CheckpointError(f"{folder} holds parts of another fold; remove it first") from None
    finally:
        own.unlink()
    content.mkdir(exist_ok=True)
    return content


def _publish(content: Path, out: Path) -> None:
    _sync(content)
    refuse_existing(out)
    content.rename(out)
    _sync(out.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
