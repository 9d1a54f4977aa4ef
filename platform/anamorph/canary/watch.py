"""The continuous canary: one pair at a time, for ever, over everything that is loaded anyway.

A pair counts only if nobody else was served meanwhile on either side: both endpoints say,
before and after, what is in flight and how many ids crossed the wire. Otherwise one side's
neighbours would look like a cost of encryption. What the canary sends counts towards the
token budgets of the versions that it measures, like every other token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import cycle

import httpx
import numpy as np
from pydantic import ValidationError

from anamorph import errors
from anamorph.canary.ledger import Ledger, show
from anamorph.canary.loaded import Baselines, Served, loaded
from anamorph.canary.measure import Size, take_pair
from anamorph.canary.sample import Clock, Target
from anamorph.canary.window import Pair
from anamorph.telemetry import Telemetry, names
from anamorph.wire.admin import InferenceTokenRead
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.serving import Usage
from anamorph.wire.states import State

_log = logging.getLogger(__name__)
_MARGIN = timedelta(seconds=120)
_PLAINTEXT = "plaintext"


@dataclass(frozen=True)
class WatchSettings:
    """How much the canary measures.

    Args:
        every_s: seconds between two pairs of one version.
        lengths: prompt lengths in ids, in turn; longer ones than a model takes are left out.
        output_tokens: ids of every answer; at least 2.
        window_s: how far back a ratio looks.
        most_pairs: of one version's window.
        most_versions: measured at a time; of more, the first that are found.
        refresh_s: seconds between two looks at what is loaded.
        usage_timeout_s: longest wait for an endpoint to say what it serves.
    """

    every_s: float = 120
    lengths: tuple[int, ...] = (16, 64, 256)
    output_tokens: int = 16
    window_s: float = 12 * 3600
    most_pairs: int = 400
    most_versions: int = 20
    refresh_s: float = 60
    usage_timeout_s: float = 5


class Watch:
    """Measures until it is told to stop.

    Args:
        keys: the key service, with a platform API key.
        http: for the endpoints, with the caller's timeouts.
        baselines: where the plaintext is.
        observed: telemetry of this process.
        settings: how much.
        rng: source of prompts and order.
        clock: monotonic seconds.
        now: the time, for the ends of tokens.
    """

    def __init__(
        self,
        keys: KeyService,
        http: httpx.Client,
        baselines: Baselines,
        observed: Telemetry,
        settings: WatchSettings,
        *,
        rng: np.random.Generator | None = None,
        clock: Clock = time.perf_counter,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._keys, self._http, self._baselines = keys, http, baselines
        self._settings, self._clock, self._now = settings, clock, now
        self._rng = rng or np.random.default_rng()
        self.ledger = Ledger(settings.window_s, settings.most_pairs)
        self._served: list[Served] = []
        self._turns: dict[Served, cycle[int]] = {}
        self._refreshed = float("-inf")
        self._tokens: dict[tuple[str, str], InferenceTokenRead] = {}
        show(self.ledger, observed.meter)
        meter = observed.meter
        self._pairs = meter.create_counter(names.CANARY_PAIRS, "{pair}", "Pairs that were measured")
        self._skipped = meter.create_counter(names.CANARY_SKIPPED, "{pair}", "Pairs that were left out")
        self._volume = meter.create_counter(names.CANARY_TOKENS, "{token}", "Ids that the canary moved")
        for counter in (self._pairs, self._skipped, self._volume):
            counter.add(0)

    def run(self, stop: threading.Event) -> None:
        """Pair after pair until ``stop``; no failure of an endpoint or of the key service ends it."""
        while not stop.is_set():
            self.turn()
            pause = self._settings.every_s / max(len(self._served), 1)
            # Not in step with whatever else runs by the clock.
            stop.wait(pause * self._rng.uniform(0.5, 1.5))

    def turn(self) -> None:
        """One pair of the version whose turn it is, if there is one and nothing disturbs it."""
        try:
            self._refresh()
            if self._served:
                served = self._served.pop(0)
                self._served.append(served)
                self._measure(served)
        except errors.AnamorphError as error:
            _log.warning("no pair: %s", error)
            if isinstance(error, errors.Unauthenticated):
                self._tokens.clear()
            self._pairs.add(1, {names.ERROR_TYPE: getattr(error, "code", None) or type(error).__name__})

    def _refresh(self) -> None:
        """Look what is loaded, if it is time to."""
        now = self._clock()
        self.ledger.expire(now)
        if now - self._refreshed < self._settings.refresh_s:
            return
        active = everything(lambda page: self._keys.all_versions(states={State.ACTIVE}, page=page))
        found, left_out = loaded(active, everything(self._keys.all_models), self._baselines)
        for reason, count in left_out.items():
            self._skipped.add(count, {names.REASON: reason})
        # In their present order: whoever has waited longest stays first.
        standing = [one for one in self._served if one in found]
        fresh = [one for one in found if one not in standing]
        self._served = [*standing, *fresh][: self._settings.most_versions]
        self._turns = {one: turns for one, turns in self._turns.items() if one in self._served}
        self.ledger.keep(self._served)
        self._refreshed = now

    def _measure(self, served: Served) -> None:
        targets = self._target(served), self._baseline(served)
        before = [self._usage(target) for target in targets]
        if None in before or any(usage and usage.in_flight for usage in before):
            self._skip("unreachable" if None in before else "busy")
            return
        size = self._size(served)
        sides = take_pair(self._http, targets, size, self._rng, self._clock)
        sent = size.prompt_tokens + size.output_tokens
        self._volume.add(2 * sent)
        after = [self._usage(target) for target in targets]
        if any(not _alone(one, other, sent) for one, other in zip(before, after, strict=True)):
            self._skip("disturbed")
            return
        self.ledger.record(served, Pair(self._clock(), size.prompt_tokens, *sides))
        self._pairs.add(1)

    def _skip(self, reason: str) -> None:
        self._skipped.add(1, {names.REASON: reason})

    def _size(self, served: Served) -> Size:
        output = self._settings.output_tokens
        fitting = [n for n in self._settings.lengths if n + output <= served.context_length]
        turns = self._turns.setdefault(served, cycle(fitting or [1]))
        return Size(served.vocab_size, next(turns), output)

    def _target(self, served: Served) -> Target:
        return Target(served.endpoint, self._token(served.tenant, served.model), served.key_id)

    def _baseline(self, served: Served) -> Target:
        return Target(served.plaintext, self._token(_PLAINTEXT, served.baseline))

    def _token(self, tenant: str, model: str) -> str:
        held = self._tokens.get((tenant, model))
        if held is None or held.expires_at - _MARGIN <= self._now():
            held = self._tokens[tenant, model] = self._keys.inference_token(tenant, model)
        return held.token

    def _usage(self, target: Target) -> Usage | None:
        """What an endpoint has served so far; none where it does not say."""
        headers = {"Authorization": f"Bearer {target.token}"}
        try:
            answer = self._http.get(
                f"{target.endpoint}/usage", headers=headers, timeout=self._settings.usage_timeout_s
            )
            return Usage.model_validate_json(answer.content) if answer.status_code == 200 else None
        except (httpx.TransportError, ValidationError):
            return None


def _alone(before: Usage | None, after: Usage | None, sent: int) -> bool:
    """Whether an endpoint served nothing but ``sent`` ids in between.

    Of an endpoint with several replicas two readings may come from two of them; then nobody knows.
    """
    if before is None or after is None or before.source != after.source:
        return True
    return after.tokens - before.tokens == sent
