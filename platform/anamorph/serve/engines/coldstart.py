"""How long an engine takes from nothing to its first token, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from opentelemetry.metrics import Meter
from opentelemetry.trace import Tracer

from anamorph.telemetry import names, traces
from anamorph.telemetry.guard import Value
from anamorph.telemetry.metrics import histogram
from anamorph.telemetry.traces import Phase as Passed

PHASES = ("fetch", "verify", "load", "first_token")


class ColdStart:
    """Times one start. It begins before there is telemetry, and is recorded once there is.

    ``fetch`` is absent where nothing had to come from the store, and includes the wait for
    another process of the node that fetches the same replica. ``first_token`` is the time
    of the first request that got one.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._passed: list[Passed] = []
        self._clock = clock
        self._record: Callable[[str, float], None] = lambda _phase, _seconds: None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a phase; parts of one name add up."""
        began = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            self.seconds[name] = self.seconds.get(name, 0.0) + ended - began
            self._passed.append(Passed(name, began, ended))

    def observe(self, meter: Meter, attributes: dict[str, Value]) -> None:
        """Record what has passed, and from now on what follows."""
        made = histogram(meter, names.ENGINE_COLD_START, "s", "Time that a phase of an engine's start took")
        self._record = lambda name, seconds: made.record(seconds, {**attributes, names.PHASE: name})
        for name, seconds in self.seconds.items():
            self._record(name, seconds)

    def trace(self, tracer: Tracer, attributes: dict[str, Value]) -> None:
        """Write what has passed as a trace of its own: from the store to a loaded engine."""
        traces.record(tracer, "engine start", self._passed, self._clock(), attributes)

    def first_token(self, passed: Iterable[Passed]) -> None:
        """Take the time of a request's first token from its phases; of all requests only the first counts."""
        before = [phase for phase in passed if phase.name != "decode"]
        if before and "first_token" not in self.seconds:
            self.seconds["first_token"] = before[-1].ended - before[0].began
            self._record("first_token", self.seconds["first_token"])
