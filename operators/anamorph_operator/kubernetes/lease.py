"""One operator at a time: a ``Lease`` that is held before anything else begins.

The holder renews it. Whoever waits takes it over once it has not *seen* it renewed for the lease's length,
by its own clock; nobody compares a time that another machine wrote. The holder counts from before it
asked for its last renewal and ends its process earlier than that. So between the two there are two seconds
in which nobody holds it, whatever the clocks say, as long as they run equally fast.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from anamorph import errors
from anamorph_operator.kubernetes.catalogue import LEASES, Object, Resource

_log = logging.getLogger(__name__)

Clock = Callable[[], float]
End = Callable[[int], object]


def monotonic() -> float:
    """Seconds that go on while the process, or the whole machine, is stopped."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Leases(Protocol):
    """What is needed of the API: ``api.Client`` with a timeout well below ``Timing.give_up_s``."""

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object: ...

    def create(self, body: Object) -> Object: ...

    def update(self, body: Object) -> Object: ...


@dataclass(frozen=True)
class Timing:
    """All in seconds: how long it lasts unrenewed, how often it is renewed or tried, when the holder ends."""

    length_s: int = 10
    every_s: float = 2
    give_up_s: float = 8


class Lease:
    """A lease of one name.

    Args:
        api: calls that no lease fences.
        who: name of this replica; every process gets its own identity from it.
        end: ends the process at once, whatever it is doing (``os._exit``).
        now: clock in seconds.
    """

    def __init__(
        self,
        api: Leases,
        namespace: str,
        name: str,
        who: str,
        end: End,
        timing: Timing = Timing(),
        now: Clock = monotonic,
    ) -> None:
        self._api = api
        self._place = (namespace, name)
        self.identity = f"{who}-{uuid.uuid4().hex[:8]}"
        self._end = end
        self._timing = timing
        self._now = now
        self._object: Object = {}
        self._renewed_at: float | None = None
        self._seen: tuple[Object, float] = ({}, 0)
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def acquire(self, stop: threading.Event) -> bool:
        """Wait until it is ours; False if ``stop`` was set first.

        Raises:
            Forbidden, Unauthenticated, BadRequest: it will never be.
        """
        said = ""
        while not stop.is_set():
            try:
                if self._try():
                    _log.info("the lease %s/%s is ours: %s", *self._place, self.identity)
                    return True
                now = f"waiting: {_spec(self._seen[0]).get('holderIdentity')} holds the lease"
            except (errors.Unavailable, errors.TooManyRequests, errors.NotFound) as error:
                now = f"waiting for the lease: {error}"
            if now != said:
                _log.info("%s", now)
            said = now
            stop.wait(self._pause())
        return False

    def keep(self) -> None:
        """Renew it from now on, and end the process when that fails for too long."""
        for work in (self._renewing, self._watching):
            thread = threading.Thread(target=work, name=f"lease {work.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def fence(self) -> None:
        """Return only if the lease is ours for sure; to be called before every write."""
        left = self._left()
        if left is None or left <= 0:
            self._lose("it could not be renewed in time")

    def release(self) -> None:
        """Give it up, so that the other need not wait; only once nothing is written any more."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._renewed_at = None
        spec = {**_spec(self._object), "holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            self._api.update({**self._object, "spec": spec})
        except errors.AnamorphError as error:
            _log.warning("the lease ends by itself, it could not be given up: %s", error)

    def _try(self) -> bool:
        asked = self._now()
        try:
            found = self._api.get(LEASES, *self._place)
        except errors.NotFound:
            found = self._new()
        self._notice(found)
        if not self._free():
            return False
        try:
            write = self._api.update if "resourceVersion" in found["metadata"] else self._api.create
            self._object = write({**found, "spec": self._taken(_spec(found))})
        except errors.Conflict:
            return False  # somebody else was faster
        self._renewed_at = asked
        return True

    def _notice(self, found: Object) -> None:
        """Remember since when we have seen it as it is."""
        if _spec(found) != _spec(self._seen[0]):
            self._seen = (found, self._now())

    def _free(self) -> bool:
        spec, since = _spec(self._seen[0]), self._seen[1]
        lasts = spec.get("leaseDurationSeconds") or self._timing.length_s
        return not spec.get("holderIdentity") or self._now() >= since + lasts

    def _pause(self) -> float:
        spec, since = _spec(self._seen[0]), self._seen[1]
        ends_in = since + (spec.get("leaseDurationSeconds") or 0) - self._now()
        return min(self._timing.every_s, max(ends_in, 0.1))

    def _taken(self, before: Object) -> Object:
        return self._renewed(before) | {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._timing.length_s,
            "acquireTime": _wall(),
            "leaseTransitions": before.get("leaseTransitions", -1) + 1,
        }

    @staticmethod
    def _renewed(before: Object) -> Object:
        return {**before, "renewTime": _wall()}

    def _new(self) -> Object:
        namespace, name = self._place
        metadata = {"namespace": namespace, "name": name}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": {}}

    def _renewing(self) -> None:
        while not self._over.wait(self._timing.every_s):
            try:
                self._renew()
            except errors.AnamorphError as error:
                _log.warning("the lease was not renewed, trying again: %s", error)

    def _renew(self) -> None:
        asked = self._now()
        try:
            self._object = self._api.update({**self._object, "spec": self._renewed(_spec(self._object))})
        except errors.Conflict:
            return self._look_again()
        except errors.NotFound:
            return self._lose("somebody has deleted it")
        self.fence()  # who was stopped meanwhile ends, even if nobody has taken it
        self._renewed_at = asked
        return None

    def _look_again(self) -> None:
        """It is at another version: an earlier renewal whose answer was lost, or it is somebody else's."""
        found = self._api.get(LEASES, *self._place)
        holder = _spec(found).get("holderIdentity")
        if holder != self.identity:
            return self._lose(f"{holder or 'nobody'} holds it")
        self._object = found
        return None

    def _watching(self) -> None:
        """A thread of its own: a renewal that hangs must not hide that time is up."""
        while True:
            self.fence()
            if self._over.wait(self._left() or 0):
                return

    def _left(self) -> float | None:
        """Seconds until it must be renewed; ``None`` if it is not ours."""
        renewed_at = self._renewed_at
        return None if renewed_at is None else renewed_at + self._timing.give_up_s - self._now()

    def _lose(self, why: str) -> None:
        _log.critical("the lease %s/%s is lost, this process ends: %s", *self._place, why)
        self._end(1)


def _spec(lease: Object) -> Object:
    spec: Object = lease.get("spec") or {}
    return spec


def _wall() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
