"""Everything one application needs to answer: its engine, its key's state, its counters."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import SpanKind
from starlette.requests import Request

from anamorph import telemetry
from anamorph.errors import ServiceError
from anamorph.serve.api.admission import Admission
from anamorph.serve.api.requests import Limits
from anamorph.serve.asgi.auth import TokenVerifier
from anamorph.serve.engines.base import Engine, Load
from anamorph.serve.engines.coldstart import ColdStart
from anamorph.wire.inference import PLAINTEXT_FINGERPRINT
from anamorph.wire.serving import EngineSettings, KeyState


class Endpoint:
    """One loaded engine under one key.

    Args:
        settings: of this application.
        engine: loaded and verified.
        observed: telemetry of this process.
        clock: seconds since the epoch.
        start: how the engine came to be; its phases are recorded here.
        entropy: ``entropy(bits)`` gives a random number; seeds sampling that names no seed.
        gauges: tell of the engine's load; an engine of many endpoints does that itself.
    """

    def __init__(
        self,
        settings: EngineSettings,
        engine: Engine,
        observed: telemetry.Telemetry,
        *,
        start: ColdStart | None = None,
        clock: Callable[[], float] = time.time,
        entropy: Callable[[int], int] = secrets.randbits,
        gauges: bool = True,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.clock = clock
        self.telemetry = observed
        self.metrics = telemetry.InferenceMetrics(
            observed.meter, settings.tenant, settings.model, settings.protection
        )
        self.admission = Admission(settings.max_concurrent + settings.max_queued)
        self.limits = Limits(
            model=settings.model,
            vocab_size=engine.vocab_size,
            context_length=min(settings.context_length, engine.context_length),
            sequences=settings.max_concurrent + settings.max_queued,
        )
        self.created = int(clock())
        self._entropy = entropy
        self.reconfigure(KeyState())
        if gauges:
            self._observe_load()
        self._start = start or ColdStart()
        self._start.observe(observed.meter, self.metrics.attributes)
        self._start.trace(observed.tracer, self.metrics.attributes)

    @property
    def fingerprint(self) -> str:
        """``system_fingerprint`` of answers: the key id."""
        return self.settings.key_id or PLAINTEXT_FINGERPRINT

    def reconfigure(self, state: KeyState) -> None:
        """Take over what the operator pushed; without it nobody is let in, for there is no public key."""
        self.state = state
        self.verifier = TokenVerifier(state.jwks, self.clock)

    def fresh_seed(self) -> int:
        """A random seed for a request that brings none."""
        return self._entropy(63)

    @contextmanager
    def observing(self, request: Request, prompt_tokens: int) -> Iterator[telemetry.RequestTimer]:
        """Span and timer of one completion; the outcome is a word, never a message."""
        timer, outcome = self.metrics.start(), "cancelled"
        context = telemetry.traces.extract(dict(request.headers))
        span = self.telemetry.tracer.start_span("text_completion", context, SpanKind.SERVER)
        try:
            yield timer
            outcome = telemetry.OK
        except ServiceError as error:
            outcome = error.code or type(error).__name__
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            timer.finish(outcome, input_tokens=prompt_tokens)
            self._start.first_token(timer.phases())
            telemetry.traces.record_phases(self.telemetry.tracer, span, timer.phases(), self.metrics.clock())
            span.set_attributes({**self.metrics.attributes, telemetry.names.KEY_ID: self.fingerprint})
            if outcome != telemetry.OK:
                span.set_attribute(telemetry.names.ERROR_TYPE, outcome)
            span.end()

    def _observe_load(self) -> None:
        for name, read in (("running", _running), ("waiting", _waiting)):
            self.telemetry.meter.create_observable_gauge(
                f"anamorph.engine.sequences.{name}", [_Gauge(self, read)], "{sequence}"
            )


class _Gauge:
    def __init__(self, endpoint: Endpoint, read: Callable[[Load], int]) -> None:
        self._endpoint = endpoint
        self._read = read

    def __call__(self, _: CallbackOptions) -> Iterator[Observation]:
        yield Observation(self._read(self._endpoint.engine.load()), self._endpoint.metrics.attributes)


def _running(load: Load) -> int:
    return load.running


def _waiting(load: Load) -> int:
    return load.waiting
