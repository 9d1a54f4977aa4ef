"""What a process of the service does besides answering: leased and periodic work, in one thread.

Every process runs it. What may be done once only is leased in the database; the rest does
no harm when two do it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from anamorph import errors
from anamorph_keysvc import idempotency
from anamorph_keysvc.service import preparation, shredding, tokens, usage
from anamorph_keysvc.service.work import Service

_log = logging.getLogger(__name__)

Observe = Callable[[str, str], None]


@dataclass(frozen=True)
class Job:
    """Something done again and again, at most every ``every_s`` seconds (0: in each round)."""

    name: str
    act: Callable[[Service], object]
    every_s: float = 0


def _forget_roots(service: Service) -> None:
    service.roots.drop_old()


JOBS = (
    Job("prepare", preparation.prepare_due),
    Job("rotate-due", usage.rotate_due),
    Job("shred", shredding.shred_due),
    Job("signing-keys", tokens.renew_signing_keys, 60),
    Job("forget-answers", idempotency.forget_old, 60),
    Job("forget-roots", _forget_roots, 30),
)


def _ignore(_job: str, _outcome: str) -> None: ...


@dataclass
class Worker:
    """Runs jobs until it is stopped. ``observe`` hears each job's name and outcome."""

    service: Service
    jobs: Sequence[Job] = JOBS
    observe: Observe = _ignore
    _stopped: threading.Event = field(default_factory=threading.Event)
    _last: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Work in a thread for the length of the block; what is under way is finished after it."""
        thread = threading.Thread(target=self._run, name="keysvc-worker")
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self.service.woken.set()
            thread.join()

    def round(self) -> None:
        """Every job that is due, once; one that fails does not keep the others from theirs."""
        for job in self.jobs:
            if self._stopped.is_set():
                return
            if monotonic() - self._last.get(job.name, -1e9) >= job.every_s:
                self._last[job.name] = monotonic()
                self.observe(job.name, self._outcome(job))

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.service.woken.wait(self.service.limits.background_interval_s)
            self.service.woken.clear()
            self.round()

    def _outcome(self, job: Job) -> str:
        try:
            job.act(self.service)
        except errors.Unavailable as error:
            _log.warning("%s: %s", job.name, error.code)
            return error.code or "unavailable"
        except Exception as error:  # noqa: BLE001 -- one bad job must not end all rotations
            _log.error("%s failed: %s", job.name, type(error).__name__)
            return type(error).__name__
        return "ok"
