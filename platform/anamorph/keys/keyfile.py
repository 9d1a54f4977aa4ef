"""The key file: one root on disk, for one pair of eyes (docs/spec/keys.md, section 6)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anamorph.errors import InvalidId, InvalidKey
from anamorph.keys.derive import check_secret
from anamorph.wire.ids import KeyId

FORMAT = "anamorph-key/1"
MAX_BYTES = 4096
_FIELDS = {"format", "key_id", "root"}


@dataclass(frozen=True)
class StoredKey:
    """What a key file says; whether root and id belong together is for its reader to check."""

    key_id: KeyId
    root: bytes = field(repr=False)


def write(path: Path, key: StoredKey) -> None:
    """Write ``key`` to a new file of mode 0600, durable when this returns.

    Raises:
        FileExistsError: ``path`` exists.
        OSError: the folder cannot be written, or knows no hard links.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(encode(key))
            file.flush()
            os.fsync(file.fileno())
        _publish(staged, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            staged.unlink()


def _publish(staged: Path, path: Path) -> None:
    # A hard link, unlike a rename, fails when the name is taken.
    try:
        os.link(staged, path, follow_symlinks=False)
    except FileExistsError:
        raise FileExistsError(f"{path} exists, and a key is never overwritten; choose another path") from None
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> StoredKey:
    """Read a key file.

    Raises:
        InvalidKey: not a key file, or readable by others than its owner.
        OSError: the file cannot be opened.
    """
    # Non-blocking: a FIFO put in a key's place must be refused, not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_status(os.fstat(descriptor), path)
        content = os.read(descriptor, MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    try:
        return decode(content)
    except (InvalidKey, InvalidId) as error:
        raise InvalidKey(f"{path}: {error}") from None


def _check_status(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidKey(f"{path} is not a regular file")
    if status.st_mode & 0o077:
        raise InvalidKey(f"{path} is open to others than its owner; run: chmod 600 {path}")


def decode(content: bytes) -> StoredKey:
    """Read the content of a key file.

    Raises:
        InvalidKey: the content is not what the specification says, to the last field.
        InvalidId: the key id does not parse.
    """
    fields = _fields(content)
    try:
        root = base64.b64decode(fields["root"], validate=True)
    except ValueError:
        raise InvalidKey("the root in this key file is not base64") from None
    # Base64 has spare bits in its last digit; one root has one spelling here.
    if base64.b64encode(root).decode("ascii") != fields["root"]:
        raise InvalidKey("the root in this key file is not canonical base64")
    return StoredKey(KeyId.parse(fields["key_id"]), check_secret(root))


def _fields(content: bytes) -> dict[str, str]:
    # No message repeats the content, and "from None" keeps it out of tracebacks.
    if len(content) > MAX_BYTES:
        raise InvalidKey("this is not a key file: it is too long")
    try:
        fields: Any = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise InvalidKey("this is not a key file: it is not JSON") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise InvalidKey(f"this is not a key file of format {FORMAT}")
    if set(fields) != _FIELDS or not all(isinstance(value, str) for value in fields.values()):
        raise InvalidKey(f"a key file holds {', '.join(sorted(_FIELDS))} and nothing else, all strings")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise InvalidKey("a key file names each field once")
    return dict(pairs)


def encode(key: StoredKey) -> bytes:
    """The content of a key file."""
    fields = {
        "format": FORMAT,
        "key_id": str(key.key_id),
        "root": base64.b64encode(key.root).decode("ascii"),
    }
    return json.dumps(fields, indent=2).encode("ascii") + b"\n"
