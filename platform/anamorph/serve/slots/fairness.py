"""Shares and limits of one pool member, in numbers: no clock, no queue, no engine."""

from __future__ import annotations

from dataclasses import dataclass

# A bucket holds what its rate gives in this time: short bursts pass, longer ones wait.
BURST_S = 1.0


@dataclass(frozen=True)
class Limits:
    """What the operator says of a member.

    Args:
        weight: share of the engine's time against the other members that want it.
        max_concurrent: sequences that are computed at a time.
        tokens_per_s: ids, of prompts and answers, that may be computed per second.
    """

    weight: float = 1.0
    max_concurrent: int = 16
    tokens_per_s: float | None = None


class Bucket:
    """A token bucket that lends: whoever finds it above zero takes all it needs, and it refills.

    A request's size is known only as a bound before it is computed. So the bound is taken,
    and what was not used is given back. Over any time T at most rate·(T + ``BURST_S``)
    and one request are let in.

    Args:
        rate: ids per second; None lets everything in.
        now: seconds.
    """

    def __init__(self, rate: float | None, now: float) -> None:
        self._rate = rate
        self._level = (rate or 0) * BURST_S
        self._at = now

    def change(self, rate: float | None, now: float) -> None:
        """Go on at another rate; a debt stays one."""
        self._refill(now)
        fresh = self._rate is None
        self._rate = rate
        ceiling = (rate or 0) * BURST_S
        self._level = ceiling if fresh else min(self._level, ceiling)

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0 if it may now."""
        if self._rate is None:
            return 0.0
        self._refill(now)
        # One id is the smallest thing there is to compute.
        return max(0.0, (min(1.0, self._rate * BURST_S) - self._level) / self._rate)

    def take(self, tokens: int) -> None:
        self._level -= tokens

    def give_back(self, tokens: int) -> None:
        self._level += tokens

    def _refill(self, now: float) -> None:
        if self._rate is not None:
            ceiling = self._rate * BURST_S
            self._level = min(ceiling, self._level + (now - self._at) * self._rate)
        self._at = now
