"""The one place that talks to Vault, and all there is of hvac: calls with deadline and retries.

hvac's adapter builds requests. What it would do beyond that is switched off or done
here: it follows redirects with the token, waits 30 s, retries nothing, loses the
status of some errors, and lets a name such as ``../decrypt/other`` leave its path.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import requests
from hvac.adapters import RawAdapter
from opentelemetry import trace
from requests.adapters import HTTPAdapter
from urllib3 import Timeout
from urllib3.exceptions import HTTPError, NewConnectionError

from anamorph.errors import InvalidId, SetupError, Unavailable
from anamorph.wire import ids
from anamorph_keysvc import deadline
from anamorph_keysvc.vault.settings import VaultSettings

RETRY_AFTER_S: Final = 5
_LABEL: Final = re.compile(ids.LABEL)
# Refused before anything was done: behind on replication, over a limit, on a standby.
_NOT_DONE: Final = frozenset({412, 429, 473})
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.5
_LONGEST_BODY: Final = 2**24


class Observer(Protocol):
    """Counts what is asked of Vault: calls by operation, logins and renewals by identity."""

    def observe(self, kind: str, outcome: str) -> None:
        """One more of ``kind`` (``encrypt``, ``login-issuer``, …) ended with ``outcome``."""
        ...


class Unobserved:
    """Counts nothing."""

    def observe(self, kind: str, outcome: str) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Call:
    """One request. ``path`` is in segments, each a label, so that no name can leave its place.

    Args:
        operation: one word for counting.
        repeatable: whether doing it twice is the same as doing it once.
        root: a path that lives outside every namespace.
    """

    operation: str
    method: str
    path: tuple[str, ...]
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    repeatable: bool = False
    root: bool = False
    wrap_ttl: str | None = None

    @property
    def url(self) -> str:
        """The path in one string. InvalidId when a segment is no label."""
        return "/".join(("v1", *(_label(part) for part in self.path)))


@dataclass(frozen=True)
class Answer:
    """What Vault said: a status below 500, and a body that may hold secrets."""

    status: int
    body: Mapping[str, Any] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether it was done."""
        return 200 <= self.status < 300

    @property
    def outcome(self) -> str:
        """One word for counting."""
        return "ok" if self.ok else f"refused_{self.status}"

    @property
    def data(self) -> Mapping[str, Any]:
        """The body's data, empty where there is none."""
        return self.body.get("data") or {}

    @property
    def reasons(self) -> str:
        """Vault's own words on a refusal: for the person who sets it up, not for logs."""
        return "; ".join(" ".join(str(error).split()) for error in self.body.get("errors") or ())


class Transport:
    """Calls one Vault; safe for many threads, which share a bounded pool of connections.

    Args:
        tracer: for a span per call, which says what kind of call it was and nothing else.
        pick: a number in [0, 1), to spread retries.

    Raises:
        SetupError: there is no such CA file.
    """

    def __init__(
        self,
        settings: VaultSettings,
        observer: Observer | None = None,
        *,
        tracer: trace.Tracer | None = None,
        pick: Callable[[], float] = random.random,
    ) -> None:
        if settings.ca_file is not None and not settings.ca_file.is_file():
            raise SetupError(f"{settings.ca_file} is missing: ca_file names the CA of Vault's certificate")
        self._settings = settings
        self.observer: Observer = observer or Unobserved()
        self._tracer = tracer or trace.NoOpTracer()
        self._pick = pick
        self._turns = threading.BoundedSemaphore(settings.max_connections)
        self._session = _session(settings)
        adapters = self._session.adapters.values()
        self._pools = [adapter.poolmanager.pools for adapter in adapters if isinstance(adapter, HTTPAdapter)]

    def call(self, call: Call, token: str | None) -> Answer:
        """Do it, within the deadline; again where that is safe and may help.

        Raises:
            InvalidId: a segment of the path is no label; Vault was not asked.
            Unavailable: ``kms_sealed``; ``kms_unavailable``; ``timeout``, if no time was left to begin with.
        """
        url = call.url
        span = self._tracer.start_as_current_span(f"vault {call.operation}", kind=trace.SpanKind.CLIENT)
        with deadline.within(self._settings.deadline_s), self._turn(), span:
            attempt = 0
            while isinstance(result := self._attempt(call, url, token), _Failure):
                if not result.again or not self._pause(attempt):
                    raise result.error
                attempt += 1
            return result

    def close(self) -> None:
        """Close the connections that wait for use."""
        # Closing the session only lets go of its pools, which exceptions may hold on to for a while.
        for pools in self._pools:
            for key in pools.keys():  # noqa: SIM118 -- this container cannot be iterated
                pools[key].close()
        self._session.close()

    def _attempt(self, call: Call, url: str, token: str | None) -> Answer | _Failure:
        try:
            answer = self._send(call, url, token)
            result = _failure(call, answer) or answer
        except (requests.RequestException, HTTPError, OSError) as error:
            # Not chained: the cause's text quotes the request.
            result = _Failure(_unavailable("does not answer"), again=call.repeatable or _unsent(error))
        except Unavailable:
            result = _Failure(_unavailable("answers too slowly"), again=False)
        self.observer.observe(call.operation, result.outcome)
        return result

    def _send(self, call: Call, url: str, token: str | None) -> Answer:
        settings = self._settings
        left = deadline.left(settings.deadline_s)
        adapter = RawAdapter(
            base_uri=settings.address,
            token=token,
            session=self._session,
            namespace=None if call.root else settings.namespace,
            allow_redirects=False,
            ignore_exceptions=True,
            strict_http=True,
        )
        response: requests.Response = adapter.request(
            call.method,
            url,
            json=call.body,
            wrap_ttl=call.wrap_ttl,
            stream=True,
            timeout=Timeout(total=left, connect=settings.connect_timeout_s, read=settings.read_timeout_s),
        )
        with response:
            return _answer(response.status_code, _read(response, settings.deadline_s))

    def _pause(self, attempt: int) -> bool:
        """Wait before the next attempt; False when the deadline leaves no time for one."""
        ceiling = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
        pause = ceiling * (0.5 + self._pick() / 2)
        try:
            if deadline.left(pause) < pause:
                return False
            time.sleep(pause)
            deadline.left(pause)
        except Unavailable:
            return False
        return True

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(timeout=deadline.left(self._settings.deadline_s)):
            raise _unavailable("is asked more than it answers")
        try:
            yield
        finally:
            self._turns.release()


@dataclass(frozen=True)
class _Failure:
    error: Unavailable
    again: bool

    @property
    def outcome(self) -> str:
        return (self.error.code or "").removeprefix("kms_")


def _failure(call: Call, answer: Answer) -> _Failure | None:
    """None for an answer that means something; otherwise why not, and whether to ask again."""
    if answer.status == 503 and "sealed" in answer.reasons.lower():
        sealed = Unavailable("Vault is sealed: unseal it", code="kms_sealed", retry_after=RETRY_AFTER_S)
        return _Failure(sealed, again=False)
    if answer.status in _NOT_DONE:
        return _Failure(_unavailable(f"answers with status {answer.status}"), again=True)
    if answer.status >= 500:
        return _Failure(_unavailable(f"answers with status {answer.status}"), again=call.repeatable)
    if 300 <= answer.status < 400:
        return _Failure(_unavailable("answers with a redirect, which is never followed"), again=False)
    return None


def _unavailable(what: str) -> Unavailable:
    return Unavailable(f"Vault {what}", code="kms_unavailable", retry_after=RETRY_AFTER_S)


def _session(settings: VaultSettings) -> requests.Session:
    session = requests.Session()
    # Without the environment: it could add a proxy, a password from ~/.netrc, or another CA.
    session.trust_env = False
    session.verify = str(settings.ca_file) if settings.ca_file else True
    session.headers["Accept-Encoding"] = "identity"
    size = settings.max_connections
    session.mount("https://", HTTPAdapter(pool_connections=1, pool_maxsize=size, max_retries=0))
    session.mount("http://", HTTPAdapter(pool_connections=1, pool_maxsize=size, max_retries=0))
    return session


def _read(response: requests.Response, most_s: float) -> bytes:
    """The whole body, part by part: a timeout of requests is per part and would start anew with each."""
    parts = bytearray()
    while part := response.raw.read1(2**16):
        deadline.left(most_s)
        parts += part
        if len(parts) > _LONGEST_BODY:
            raise requests.exceptions.ContentDecodingError("a body beyond all reason")
    return bytes(parts)


def _answer(status: int, body: bytes) -> Answer:
    """An answer without JSON, such as a proxy's page, is only its status; a success has JSON or nothing."""
    try:
        found = json.loads(body) if body else {}
    except ValueError:
        found = None
    if isinstance(found, dict):
        return Answer(status, found)
    if status < 300:
        raise requests.exceptions.InvalidJSONError("no answer of Vault's")
    return Answer(status, {})


def _unsent(error: Exception) -> bool:
    """Whether nobody took the connection, so that nothing can have been done."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.ConnectTimeout) or isinstance(reason, NewConnectionError)


def _label(part: str) -> str:
    if not _LABEL.fullmatch(part):
        raise InvalidId("a name at Vault is 1 to 63 of a-z, 0-9 and '-', and starts and ends with no '-'")
    return part
