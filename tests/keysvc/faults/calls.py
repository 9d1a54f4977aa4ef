"""Calls of the service as bare HTTP, with how and when each ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from tests.servers.production import KeyServiceProcess

PROBLEM = "application/problem+json"
# What is promised: every call ends within this, whatever is down, and all goes on so soon after it is back.
ANSWERED_S, RESUMED_S = 3.5, 30
# For this machine, on which servers, callers and other tests run as well; a call that hangs takes far longer.
SLACK_S = 2.0


@dataclass(frozen=True)
class Outcome:
    """How one call ended, and after how many seconds."""

    status: int
    media: str
    body: dict[str, Any] = field(repr=False)
    seconds: float

    @property
    def code(self) -> str:
        return str(self.body.get("code", ""))

    @property
    def as_promised(self) -> bool:
        """Done, or refused for now with a problem that says why."""
        return self.status < 300 or (self.status == 503 and self.media == PROBLEM and self.code != "")


def ask(
    process: KeyServiceProcess,
    method: str,
    path: str,
    token: str | None = None,
    body: Any = None,
    *,
    key: str | None = None,
) -> Outcome:
    """One call, sent once; far more time than the service has to answer is no answer at all."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Idempotency-Key": key} if key else {}
    began = time.monotonic()
    with httpx.Client(trust_env=False, timeout=30) as http:
        answer = http.request(method, f"{process.url}{path}", json=body, headers=headers)
    seconds = time.monotonic() - began
    media = answer.headers.get("content-type", "").partition(";")[0]
    return Outcome(answer.status_code, media, answer.json(), seconds)


def at_once(calls: dict[str, Callable[[], Outcome]]) -> dict[str, Outcome]:
    """All calls at the same time; how each ended."""
    ended: dict[str, Outcome] = {}

    def make(name: str, call: Callable[[], Outcome]) -> None:
        ended[name] = call()

    threads = [threading.Thread(target=make, args=item) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(ended) == set(calls), "a call broke off"
    return ended


def until(happened: Callable[[], bool], seconds: float = RESUMED_S) -> float:
    """Wait for what the service does by itself, as soon as is promised; how many seconds it took."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if happened():
            return time.monotonic() - began
        time.sleep(0.1)
    raise AssertionError(f"it did not happen in {seconds} s")


def slowest(outcomes: Iterable[Outcome], live: Outcome | None = None) -> float:
    """After how many seconds the last answer came, which is as soon as is promised.

    ``live`` is a look at /livez among them: it waits for nobody, so what it took is this machine's own.
    """
    took = max(round(outcome.seconds, 2) for outcome in outcomes)
    allowed = ANSWERED_S + SLACK_S + (live.seconds if live else 0)
    assert took <= allowed, (
        f"a call took {took} s: {ANSWERED_S} s are promised, and {allowed:.1f} s allowed here"
    )
    return took
