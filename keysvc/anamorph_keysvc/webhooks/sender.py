"""One request to one receiver: to a checked address, over verified TLS, within one deadline."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpcore

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.webhooks.guard import Destination, Guard, parse

# As much of an answer as is read, so that a receiver is not cut off; none of it is kept.
_MOST_BYTES = 16 * 1024
_CONNECT_S = 3.0
_FOREVER_S = 3600.0
_TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt: a status, or ``error`` in a few words of ours.

    ``retry_after`` is what the receiver asked for, in seconds.
    """

    status: int | None = None
    error: str | None = None
    retry_after: float | None = None

    @property
    def delivered(self) -> bool:
        """Whether the receiver has taken the message."""
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """Posts to receivers; follows no redirect, keeps no connection, uses no proxy.

    Args:
        guard: decides on each address that is connected to.
        ca_file: PEM certificates trusted besides the system's.
        timeout_s: of one request, everything together.
    """

    def __init__(self, guard: Guard, *, ca_file: Path | None = None, timeout_s: float = 10) -> None:
        self._guard = guard
        self._tls = trust(ca_file)
        self._timeout_s = timeout_s

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Send ``body``; whatever goes wrong is in the outcome."""
        try:
            with deadline.within(self._timeout_s):
                return self._post(url, headers, body)
        except errors.Unprocessable as error:
            return Outcome(error="host not found" if error.code == "host_not_found" else "address refused")
        except (errors.Unavailable, httpcore.TimeoutException):
            return Outcome(error=_TIMED_OUT)
        except httpcore.ConnectError as error:
            # The pool drops the cause, and leaves it as the argument.
            tls = any(isinstance(cause, ssl.SSLError) for cause in error.args)
            return Outcome(error="TLS failed" if tls else "no connection")
        except (httpcore.NetworkError, httpcore.ProtocolError):
            return Outcome(error="not answered in HTTP")

    def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        to = parse(url)
        backend = _CheckedBackend(self._guard)
        pool = httpcore.ConnectionPool(self._tls, max_connections=1, retries=0, network_backend=backend)
        sent = {
            "Host": _authority(to),
            "User-Agent": "anamorph-keysvc",
            "Content-Type": "application/json",
            **headers,
        }
        with pool, pool.stream("POST", url, headers=list(sent.items()), content=body) as response:
            _drop(response)
            return Outcome(response.status, _problem(response.status), _retry_after(response))


def trust(ca_file: Path | None) -> ssl.SSLContext:
    """Verification of receivers: the system's certificates, and those of a file.

    Raises:
        SetupError: the file cannot be read, or holds no certificate.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise errors.SetupError(
                f"{ca_file} holds no certificates in PEM: {type(error).__name__}"
            ) from None
    return context


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to addresses that the guard has admitted; the name stays for SNI, certificate and Host."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first address that takes one."""
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._guard.addresses(Destination(host.strip("[]"), port)):
            try:
                stream = self._sockets.connect_tcp(
                    str(address), port, _left(timeout, _CONNECT_S), local_address, socket_options
                )
                return _HurriedStream(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _HurriedStream(httpcore.NetworkStream):
    """A connection whose every step ends at the deadline, however slowly bytes drip."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """As the stream's."""
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """As the stream's."""
        self._stream.write(buffer, _left(timeout))

    def close(self) -> None:
        """As the stream's."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """As the stream's."""
        return _HurriedStream(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        """As the stream's."""
        return self._stream.get_extra_info(info)


def _authority(to: Destination) -> str:
    host = f"[{to.host}]" if ":" in to.host else to.host
    return host if to.port == 443 else f"{host}:{to.port}"


def _left(timeout: float | None, most: float = _FOREVER_S) -> float:
    return deadline.left(most if timeout is None else min(timeout, most))


def _drop(response: httpcore.Response) -> None:
    """Read a little of the body. What happens to the rest changes nothing: the status is here."""
    seen = 0
    try:
        for chunk in response.iter_stream():
            seen += len(chunk)
            if seen > _MOST_BYTES:
                return
    except (errors.Unavailable, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
        return


def _problem(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    return "redirects are not followed" if 300 <= status < 400 else "refused by the receiver"


def _retry_after(response: httpcore.Response) -> float | None:
    for name, value in response.headers:
        if name.lower() == b"retry-after" and value.isdigit() and len(value) <= 9:
            return float(value)
    return None
