"""Audit logs and their checkpoints as files: JSON lines that an export continues, objects in a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from anamorph.errors import AuditRefused, BadRequest, SetupError
from anamorph.wire.admin import AuditRead, Page
from anamorph.wire.audit import START, Checkpoint, checkpoint_of
from anamorph.wire.checkpoints import Refused, SignedCheckpoint, decode, object_name
from anamorph.wire.keyservice import KeyService

_LONGEST_LINE = 2**20
_OBJECTS_AT_ONCE = 256


def read_log(path: Path) -> Iterator[AuditRead]:
    """The rows of an exported log, in order.

    Raises:
        AuditRefused: a line that is no whole row.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
            yield _row(line, number)


def _row(line: bytes, number: int) -> AuditRead:
    try:
        if line.endswith(b"\n"):
            return AuditRead.model_validate_json(line)
    except ValidationError:
        pass
    raise AuditRefused(f"line {number} of the file is no whole row of an audit log")


@dataclass(frozen=True)
class Exported:
    """What an export has written: rows in the file now, of which so many are new."""

    rows: int
    new: int


def export_log(keys: KeyService, tenant: str, path: Path) -> Exported:
    """Write a tenant's whole log to ``path``, or continue a file that holds its beginning.

    Each page is on disk before the next is fetched, and beside the file lies the place in
    the list (``.page``) from which an export that was killed, or a later one, goes on.

    Raises:
        AuditRefused: the file is not the beginning of the log that the service has.
        OSError: the file cannot be written.
    """
    head = start = _repaired(path)
    place = path.with_name(f"{path.name}.page")
    token = place.read_text("ascii").strip() if place.exists() and head != START else ""
    met = start == START
    with _appending(path) as file:
        for fetched_by, rows in _pages(keys, tenant, token or None):
            met = met or any(row.sequence == start.sequence for row in rows)
            fresh = _after(rows, head)
            file.writelines(row.model_dump_json().encode() + b"\n" for row in fresh)
            file.flush()
            os.fsync(file.fileno())
            place.write_text(f"{fetched_by or ''}\n", "ascii")
            head = checkpoint_of(fresh[-1]) if fresh else head
    if not met:
        raise _other_log(start)
    return Exported(head.sequence, head.sequence - start.sequence)


def _repaired(path: Path) -> Checkpoint:
    """The head of the rows in the file, after cutting off a line that a kill left unfinished."""
    if not path.exists():
        return START
    with path.open("r+b") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(whole)
    head = START
    for row in read_log(path):
        head = checkpoint_of(row)
    return head


def _appending(path: Path) -> IO[bytes]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "ab")


def _pages(keys: KeyService, tenant: str, token: str | None) -> Iterator[tuple[str | None, list[AuditRead]]]:
    """Pages with the token that each was fetched by, so that the last one can be asked for again."""
    while True:
        try:
            page: Page[AuditRead] = keys.audit(tenant, page=token)
        except BadRequest:
            if token is None:
                raise
            token = None  # the service has no such page any more: from the start, skipping what is there
            continue
        yield token, page.items
        token = page.next_page
        if token is None:
            return


def _after(rows: list[AuditRead], head: Checkpoint) -> list[AuditRead]:
    """The rows after ``head``, which must follow from it.

    Raises:
        AuditRefused: the service's rows are not those of the file.
    """
    fresh = [row for row in rows if row.sequence > head.sequence]
    known = [row for row in rows if row.sequence == head.sequence]
    follows = not fresh or (fresh[0].sequence, fresh[0].previous) == (head.sequence + 1, head.digest)
    if not follows or any(row.digest != head.digest for row in known):
        raise _other_log(head)
    return fresh


def _other_log(head: Checkpoint) -> AuditRefused:
    return AuditRefused(
        f"the service's log is not the one in the file, at row {head.sequence} or before:"
        " verify both, and export to a new file"
    )


@dataclass(frozen=True)
class CheckpointsFound:
    """Objects that are checkpoints, signatures not looked at, and those that are none."""

    good: tuple[SignedCheckpoint, ...] = ()
    refused: tuple[Refused, ...] = ()


def read_checkpoints(source: str, tenant: str) -> CheckpointsFound:
    """All checkpoints of a tenant in a folder or store.

    Args:
        source: folder or URL that the key service exports to.
        tenant: tenant id.

    Raises:
        SetupError: no such folder, or a URL that is not supported.
        OSError: it cannot be read.
    """
    good, refused = [], []
    for name, content in _objects(source, tenant):
        try:
            checkpoint = decode(content)
            if object_name(checkpoint.tenant, checkpoint.sequence) != name:
                raise AuditRefused("it is the checkpoint of another row than its name says")
        except AuditRefused as error:
            refused.append(Refused(name, str(error)))
        else:
            good.append(checkpoint)
    return CheckpointsFound(tuple(good), tuple(refused))


def _objects(source: str, tenant: str) -> Iterable[tuple[str, bytes]]:
    from anamorph.replica.location import local_path

    folder = local_path(source)
    if folder is None:
        return _remote_objects(source, tenant)
    if not folder.is_dir():
        raise SetupError(f"there is no folder {folder}: name the one that the key service exports to")
    paths = sorted(path for path in (folder / tenant).glob("*") if not path.name.startswith("."))
    return ((f"{tenant}/{path.name}", path.read_bytes()) for path in paths)


def _remote_objects(source: str, tenant: str) -> Iterator[tuple[str, bytes]]:
    from anamorph.replica.location import remote_path

    filesystem, root = remote_path(source)
    place = f"{root.rstrip('/')}/{tenant}"
    names: list[str] = sorted(map(str, filesystem.find(place))) if filesystem.exists(place) else []
    for start in range(0, len(names), _OBJECTS_AT_ONCE):
        # A few hundred at a time: a year of checkpoints is many small objects.
        wanted = names[start : start + _OBJECTS_AT_ONCE]
        found = filesystem.cat(wanted)
        yield from ((f"{tenant}/{name.rpartition('/')[2]}", found[name]) for name in wanted)
