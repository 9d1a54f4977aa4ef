"""Who asks when and how much: tenants by Zipf's law, in sessions, with long-tailed lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A session: requests of one tenant with pauses, as a person or a batch of work makes them.
REQUESTS_PER_SESSION = 5
PAUSE_S = 20.0
# Log-normal lengths in tokens: median, and standard deviation of the logarithm; then bounds.
PROMPT = (250.0, 0.9)
OUTPUT = (120.0, 0.8)
LONGEST = 4096


@dataclass(frozen=True)
class Traffic:
    """All requests of one run, by time.

    Args:
        at: seconds, ascending.
        tenant: numbers from 0, the busiest first.
        prompt, output: tokens.
    """

    at: NDArray[np.float64]
    tenant: NDArray[np.int64]
    prompt: NDArray[np.float64]
    output: NDArray[np.float64]

    def requests(self) -> Iterator[tuple[float, int, float, float]]:
        """Each request as plain numbers."""
        columns = (self.at, self.tenant, self.prompt, self.output)
        return zip(*(column.tolist() for column in columns), strict=True)


def zipf(tenants: int, exponent: float) -> NDArray[np.float64]:
    """Each tenant's part of all traffic."""
    weights = 1.0 / np.arange(1, tenants + 1) ** exponent
    return np.asarray(weights / weights.sum())


def draw(seed: int, *, tenants: int, per_s: float, seconds: float, exponent: float = 1.0) -> Traffic:
    """Traffic of ``tenants`` at ``per_s`` requests a second on average; the same for the same seed."""
    source = np.random.default_rng(seed)
    sessions = source.poisson(per_s * seconds / REQUESTS_PER_SESSION)
    sizes = source.geometric(1 / REQUESTS_PER_SESSION, sessions)
    owner = source.choice(tenants, sessions, p=zipf(tenants, exponent))
    begin = source.uniform(0, seconds, sessions)
    at = np.repeat(begin, sizes) + _pauses(source, sizes)
    at %= seconds  # a session that runs over the end stands for one that began before the beginning
    order = np.argsort(at, kind="stable")
    prompt, output = (_lengths(source, *shape, len(at)) for shape in (PROMPT, OUTPUT))
    return Traffic(at[order], np.repeat(owner, sizes)[order], prompt, output)


def _pauses(source: np.random.Generator, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds since the beginning of its session, for each request."""
    gaps = source.exponential(PAUSE_S, int(sizes.sum()))
    firsts = np.cumsum(sizes) - sizes
    gaps[firsts] = 0.0
    total = np.cumsum(gaps)
    return np.asarray(total - np.repeat(total[firsts], sizes))


def _lengths(source: np.random.Generator, median: float, spread: float, n: int) -> NDArray[np.float64]:
    drawn = source.lognormal(np.log(median), spread, n)
    return np.asarray(np.clip(np.round(drawn), 1, LONGEST))
