"""The home folder of a service on one machine: database, wrapping key, platform key, lock."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlmodel import select

from anamorph.errors import SetupError
from anamorph.wire.admin import Role
from anamorph_keysvc import credentials, schema
from anamorph_keysvc.database import Database
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import tokens
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.tables import ApiKey
from anamorph_keysvc.wrapper import KEY_BYTES, KeyWrapper, LocalWrapper, check_private

_INIT = "init"


@dataclass(frozen=True)
class Home:
    """Where everything of one service lies; the folder is its owner's alone."""

    path: Path

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.path / "keysvc.db"

    @property
    def wrapping_key(self) -> Path:
        """32 random bytes that all roots are wrapped under."""
        return self.path / "wrapping.key"

    @property
    def platform_key(self) -> Path:
        """The platform's API key, for the operator."""
        return self.path / "platform-admin.key"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home; the kernel lets go of it however the process ends.

        Raises:
            SetupError: it is missing, open to others, or another process holds it.
        """
        check_private(self.path)
        descriptor = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SetupError(f"another key service is using {self.path}: stop it first") from None
            yield
        finally:
            os.close(descriptor)


def init(home: Home, clock: Callable[[], datetime], entropy: Callable[[int], bytes]) -> None:
    """Create what is missing, upgrade the schema; running it again changes nothing.

    Raises:
        SetupError: the home is open to others or in use, or its wrapping key is lost.
    """
    home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with home.locked():
        if home.database.exists() and not home.wrapping_key.exists():
            raise SetupError(
                f"{home.wrapping_key} is missing: restore it, the stored keys open with nothing else"
            )
        _create(home.wrapping_key, entropy(KEY_BYTES))
        create_platform_key(home.platform_key, entropy)
        _create(home.database, b"")  # SQLite's own files beside it take its permissions
        database = Database.sqlite(home.database)
        try:
            schema.upgrade(database.engine)
            service = Service(database, LocalWrapper.load(home.wrapping_key), Limits(), clock, entropy)
            tokens.ensure_signing_key(service)
            register_platform_key(service, home.platform_key)
        finally:
            database.close()


def create_platform_key(path: Path, entropy: Callable[[int], bytes]) -> None:
    """Draw the platform's API key into a private file, if there is none."""
    _create(path, credentials.mint(credentials.API_KEY, entropy).encode())


def _create(path: Path, content: bytes) -> None:
    """Write a private file if there is none, all of it or nothing."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def register_platform_key(service: Service, path: Path) -> None:
    """Make the key in the file the platform's; a key from a lost file is revoked with that."""
    check_private(path)
    hashed = credentials.hashed(path.read_text().strip())
    with service.work(_INIT, PLATFORM) as work:
        known = work.session.exec(select(ApiKey).where(ApiKey.role == Role.PLATFORM)).all()
        for key in known:
            if key.hash != hashed and key.revoked_at is None:
                key.revoked_at = work.now
                work.session.add(key)
        if hashed not in {key.hash for key in known}:
            work.session.add(
                ApiKey(
                    id=work.fresh_id("key"),
                    name="platform-admin",
                    role=Role.PLATFORM,
                    hash=hashed,
                    created_at=work.now,
                )
            )


def open_service(
    home: Home, *, production: bool, clock: Callable[[], datetime], entropy: Callable[[int], bytes]
) -> Service:
    """The service of an initialised home.

    Raises:
        SetupError: not initialised, open to others, of another release, or not fit for production.
    """
    for path in (home.wrapping_key, home.platform_key, home.database):
        check_private(path)
    wrapper: KeyWrapper = LocalWrapper.load(home.wrapping_key)
    if production and not wrapper.production:
        raise SetupError(
            "production needs a key-management service: a wrapping key in a file is for one machine"
        )
    database = Database.sqlite(home.database)
    schema.check(database.engine, remedy="anamorph-keysvc init")
    return Service(database, wrapper, Limits(), clock, entropy)
