"""A port before an HTTP server that counts requests and can hold answers back; bytes pass unchanged.

Unchanged, because a signed request (S3) names the host and port that it was sent to.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

HOST = "127.0.0.1"
_REQUEST = re.compile(rb"^([A-Z]+) (\S+) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"\r\nrange: *(\S+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What was asked for: method, path without its query, and the range of bytes, if there is one."""

    method: str
    path: str
    range: str


@dataclass
class Counting:
    """A listening port.

    Args:
        requests: what came through it.
        delay_s: before each request is passed on.
        cut: requests and connections end without an answer.
    """

    port: int
    requests: list[Request] = field(default_factory=list)
    delay_s: float = 0
    cut: bool = False

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def reads(self, suffix: str = "") -> list[Request]:
        """Requests that fetched the content of an object whose name ends so."""
        return [one for one in self.requests if one.method == "GET" and one.path.endswith(suffix)]

    def _note(self, data: bytes) -> None:
        if found := _REQUEST.match(data):
            ranged = _RANGE.search(data)
            path = found[2].decode("latin-1").partition("?")[0]
            asked = Request(found[1].decode("ascii"), path, ranged[1].decode("ascii") if ranged else "")
            self.requests.append(asked)
            time.sleep(self.delay_s)


@contextmanager
def counting(upstream: int) -> Iterator[Counting]:
    """A counting port before the loopback port ``upstream``, closed at the end."""
    with socket.create_server((HOST, 0)) as server:
        made = Counting(server.getsockname()[1])
        ends: list[socket.socket] = []
        accepting = threading.Thread(target=_accept, args=(server, upstream, made, ends), daemon=True)
        accepting.start()
        try:
            yield made
        finally:
            # A blocked accept ends with its socket shut down, not with it closed.
            server.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for one in ends:
                one.close()


def _accept(server: socket.socket, upstream: int, made: Counting, ends: list[socket.socket]) -> None:
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            ends.append(client)
            if made.cut:
                client.close()
                continue
            ends.append(remote := socket.create_connection((HOST, upstream)))
            for source, target, counted in ((client, remote, True), (remote, client, False)):
                threading.Thread(
                    target=_pump, args=(source, target, made if counted else None), daemon=True
                ).start()


def _pump(source: socket.socket, target: socket.socket, made: Counting | None) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            if made is not None:
                made._note(data)
                if made.cut:
                    break
            target.sendall(data)
    if made is not None and made.cut:
        source.close()
    with suppress(OSError):
        # Both ways: a client whose request was cut off must not wait for its answer.
        target.shutdown(socket.SHUT_RDWR if made is not None and made.cut else socket.SHUT_WR)
