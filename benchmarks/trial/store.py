"""An S3-compatible store that can die and come back with its data: SeaweedFS in a process of its own."""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs
from tests.servers.process import Program, free_port
from tests.servers.s3 import command

BUCKET = "replicas"


@dataclass
class ObjectStore:
    """The server, its one user, and the URL under which replicas lie."""

    program: Program
    endpoint: str
    access: str
    secret: str

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/trial"

    def start(self) -> None:
        """Start it, or start it again, and wait until an object can be written."""
        self.program.start(self._writable)

    def kill(self) -> None:
        """Kill -9."""
        self.program.stop(signal.SIGKILL)

    def _writable(self) -> bool:
        client = s3fs.S3FileSystem(
            key=self.access, secret=self.secret, endpoint_url=self.endpoint, skip_instance_cache=True
        )
        try:
            client.makedirs(BUCKET, exist_ok=True)
            client.pipe_file(f"{BUCKET}/ready", b"")
        except OSError:
            return False
        return True


@contextmanager
def running_store(folder: Path) -> Iterator[ObjectStore]:
    """The store, its data below ``folder``."""
    port, data, config = free_port(), folder / "objects", folder / "s3.json"
    data.mkdir()
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    credentials = [{"accessKey": access, "secretKey": secret}]
    user = {"name": "trial", "credentials": credentials, "actions": actions}
    config.write_text(json.dumps({"identities": [user]}))
    program = Program(command(data, config, port), folder / "s3.log")
    store = ObjectStore(program, f"http://127.0.0.1:{port}", access, secret)
    try:
        store.start()
        yield store
    finally:
        store.kill()
