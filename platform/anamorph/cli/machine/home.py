"""The home folder of one machine's system: where everything lies, and what runs."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from anamorph.errors import SetupError

TENANTS = ("acme", "globex")
MODEL = "smollm2"


def default_home() -> Path:
    """``$XDG_DATA_HOME/anamorph``, or ``~/.local/share/anamorph``."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "anamorph"


HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Folder of the system; by default ~/.local/share/anamorph.")
]


@dataclass(frozen=True)
class Running:
    """One process that ``up`` started; ``started`` (seconds since the epoch) tells a reused pid."""

    name: str
    pid: int
    started: float


@dataclass(frozen=True)
class SystemState:
    """What ``state.json`` holds: nothing secret.

    Args:
        instance: random mark in the environment of every process of this start.
        ready: whether ``up`` came through.
    """

    instance: str
    processes: tuple[Running, ...] = ()
    urls: dict[str, str] = field(default_factory=dict)
    ready: bool = False

    def plus(self, process: Running, **urls: str) -> SystemState:
        """The state with one more process and its URLs."""
        return replace(self, processes=(*self.processes, process), urls=self.urls | urls)


@dataclass(frozen=True)
class Home:
    """Paths under one root, which only its owner may enter."""

    root: Path

    @classmethod
    def at(cls, root: Path | None) -> Home:
        """The home at ``root``, or at the default place."""
        return cls((root or default_home()).expanduser().absolute())

    @property
    def state_file(self) -> Path:
        return self.root / "state.json"

    @property
    def keysvc(self) -> Path:
        return self.root / "keysvc"

    @property
    def platform_key(self) -> Path:
        return self.keysvc / "platform-admin.key"

    @property
    def ray(self) -> Path:
        return self.root / "ray"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def api_key(self, tenant: str, role: str) -> Path:
        """File with a tenant's API key."""
        return self.root / "api-keys" / f"{tenant}-{role}.key"

    def create(self) -> None:
        """Make the folders, closed to others.

        Raises:
            SetupError: the root exists and others may enter it.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.root.stat().st_mode & 0o077:
            raise SetupError(f"{self.root} is open to others; run: chmod 700 {self.root}")
        for folder in (self.logs, self.store, self.scratch, self.root / "api-keys"):
            folder.mkdir(mode=0o700, exist_ok=True)

    def load(self) -> SystemState | None:
        """The state last saved; ``None`` if nothing was started here."""
        try:
            fields = json.loads(self.state_file.read_text())
        except FileNotFoundError:
            return None
        processes = tuple(Running(**process) for process in fields.pop("processes"))
        return SystemState(**fields, processes=processes)

    def save(self, state: SystemState) -> None:
        """Write ``state.json`` in one step."""
        write_private(self.state_file, json.dumps(asdict(state), indent=1))

    def running(self) -> SystemState:
        """The state of a system that is up.

        Raises:
            SetupError: it is not.
        """
        state = self.load()
        if state is None or not state.ready:
            raise SetupError(f"nothing runs in {self.root}; run: anamorph up")
        return state

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one ``up`` or ``down`` work at a time.

        Raises:
            SetupError: another one is at it.
        """
        descriptor = os.open(self.root / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise SetupError(f"another `anamorph up` or `down` is at work in {self.root}") from None
        finally:
            os.close(descriptor)


def write_private(path: Path, text: str) -> None:
    """Write a 0600 file whole or not at all."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)
